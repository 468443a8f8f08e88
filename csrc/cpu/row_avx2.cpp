// Row kernels for AVX2 with FMA and F16C.
#include "row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "instruction_set.h"

MEGATRON_SIP_TARGET_BEGIN("avx2,fma,f16c")

namespace megatron_sip {
namespace {

struct Register {
  static constexpr int64_t kWidth = 8;
  __m256 v;

  static inline void load(const Float* p, Register& a, Register& b) {
    a.v = _mm256_loadu_ps(&p->value);
    b.v = _mm256_loadu_ps(&p[kWidth].value);
  }
  // `a` gets the even ones and `b` the odd ones.
  static inline void load(const BFloat16* p, Register& a, Register& b) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a.v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    b.v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
  static inline void load(const Half* p, Register& a, Register& b) {
    a.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + kWidth)));
  }
  static inline void store(Float* p, Register a, Register b) {
    _mm256_storeu_ps(&p->value, a.v);
    _mm256_storeu_ps(&p[kWidth].value, b.v);
  }
  static inline void store(BFloat16* p, Register a, Register b) {
    // Half an ulp is added and the upper words are kept: rounds to nearest, ties away from zero. NaNs stay NaNs.
    const __m256i half_ulp = _mm256_set1_epi32(0x8000);
    const __m256i even = _mm256_add_epi32(_mm256_castps_si256(a.v), half_ulp);
    const __m256i odd = _mm256_add_epi32(_mm256_castps_si256(b.v), half_ulp);
    const __m256i packed = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  static inline void store(Half* p, Register a, Register b) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + kWidth), _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
  }
  inline void to_lanes(float* p) const { _mm256_storeu_ps(p, v); }

  static inline Register broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static inline Register add(Register a, Register b) { return {_mm256_add_ps(a.v, b.v)}; }
  static inline Register mul(Register a, Register b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static inline Register fma(Register a, Register b, Register c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static inline Register max(Register a, Register b) { return {_mm256_max_ps(a.v, b.v)}; }

  // The exponents of 0 and of infinity, between which 2^floor(a) is put together in the exponent's bits.
  static inline __m256 bounded(Register a) {
    return _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), a.v));
  }
  static inline Register fraction(Register a) { return {_mm256_sub_ps(bounded(a), _mm256_floor_ps(bounded(a)))}; }
  static inline Register times_power(Register a, Register b) {
    // 2^23 + 127: the sum's low bits are the exponent's.
    const __m256 biased = _mm256_add_ps(_mm256_floor_ps(bounded(b)), _mm256_set1_ps(8388735.0f));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased), 23)))};
  }
};

constexpr int kRegisters = 2;

#include "row_algorithms.h"

}  // namespace

const RowKernels* avx2_kernels(LogitType type) { return float_lane_kernels(type); }

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_END

#else

const megatron_sip::RowKernels* megatron_sip::avx2_kernels(LogitType) { return nullptr; }

#endif
