// Row kernels for AVX-512 (F, BW, DQ, VL).
#include "row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

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

  static inline Register load(const Float* p) { return {_mm512_loadu_ps(&p->value)}; }
  static inline Register load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static inline Register load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static inline void store(Float* p, Register x) { _mm512_storeu_ps(&p->value, x.v); }
  static inline void store(BFloat16* p, Register x) {
    // Half an ulp is added and the upper words are gathered: rounds to nearest, ties away from zero. NaNs stay NaNs.
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x8000));
    const __m512i upper_words = _mm512_set_epi64(0, 0, 0, 0, 0x001F001D001B0019, 0x0017001500130011, 0x000F000D000B0009,
                                                 0x0007000500030001);
    const __m512i packed = _mm512_permutexvar_epi16(upper_words, rounded);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(packed));
  }
  static inline void store(Half* p, Register x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
  }
  inline void to_lanes(float* p) const { _mm512_storeu_ps(p, v); }

  static inline Register broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static inline Register add(Register a, Register b) { return {_mm512_add_ps(a.v, b.v)}; }
  static inline Register sub(Register a, Register b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static inline Register mul(Register a, Register b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static inline Register fma(Register a, Register b, Register c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static inline Register fms(Register a, Register b, Register c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
  static inline Register max(Register a, Register b) { return {_mm512_max_ps(a.v, b.v)}; }
  static inline Register exponent_from_low_bits(Register a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
  }
};

constexpr int kRegisters = 2;

#include "row_algorithms.h"

}  // namespace

const RowKernels* avx512_kernels(LogitType type) { return float_lane_kernels(type); }

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_END

#else

const megatron_sip::RowKernels* megatron_sip::avx512_kernels(LogitType) { return nullptr; }

#endif
