// Row kernels for AVX-512 (F, BW, DQ, VL).
#include "row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "instruction_set.h"

// GCC 12 and 13 take the intrinsics' own "undefined" operands for uninitialised variables (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

MEGATRON_SIP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace megatron_sip {
namespace {

struct Register {
  static constexpr int64_t kWidth = 16;
  __m512 v;

  static inline void load(const Float* p, Register& a, Register& b) {
    a.v = _mm512_loadu_ps(&p->value);
    b.v = _mm512_loadu_ps(&p[kWidth].value);
  }
  // `a` gets the even ones and `b` the odd ones.
  static inline void load(const BFloat16* p, Register& a, Register& b) {
    const __m512i pairs = _mm512_loadu_si512(p);
    a.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    b.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
  static inline void load(const Half* p, Register& a, Register& b) {
    a.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kWidth)));
  }
  static inline void store(Float* p, Register a, Register b) {
    _mm512_storeu_ps(&p->value, a.v);
    _mm512_storeu_ps(&p[kWidth].value, b.v);
  }
  static inline void store(BFloat16* p, Register a, Register b) {
    // Half an ulp is added and the upper words are kept: rounds to nearest, ties away from zero. NaNs stay NaNs.
    const __m512i half_ulp = _mm512_set1_epi32(0x8000);
    const __m512i even = _mm512_add_epi32(_mm512_castps_si512(a.v), half_ulp);
    const __m512i odd = _mm512_add_epi32(_mm512_castps_si512(b.v), half_ulp);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(even, 16), odd));
  }
  static inline void store(Half* p, Register a, Register b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kWidth), _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
  }
  inline void to_lanes(float* p) const { _mm512_storeu_ps(p, v); }

  static inline Register broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static inline Register add(Register a, Register b) { return {_mm512_add_ps(a.v, b.v)}; }
  static inline Register mul(Register a, Register b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static inline Register fma(Register a, Register b, Register c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static inline Register max(Register a, Register b) { return {_mm512_max_ps(a.v, b.v)}; }
  static inline Register fraction(Register a) {
    return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  }
  static inline Register times_power(Register a, Register b) { return {_mm512_scalef_ps(a.v, b.v)}; }
};

constexpr int kRegisters = 4;

#include "row_algorithms.h"

}  // namespace

const RowKernels* avx512_kernels(LogitType type) { return float_lane_kernels(type); }

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_END

#else

const megatron_sip::RowKernels* megatron_sip::avx512_kernels(LogitType) { return nullptr; }

#endif
