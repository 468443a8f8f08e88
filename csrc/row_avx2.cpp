// Row kernels for AVX2 with FMA and F16C.
#include "row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "instruction_set.h"

MEGATRON_SIP_TARGET_BEGIN("avx2,fma,f16c")

namespace megatron_sip {
namespace {

struct Register {
  static constexpr int64_t kWidth = 8;
  __m256 v;

  static inline Register load(const Float* p) { return {_mm256_loadu_ps(&p->value)}; }
  static inline Register load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static inline Register load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static inline void store(Float* p, Register x) { _mm256_storeu_ps(&p->value, x.v); }
  static inline void store(BFloat16* p, Register x) {
    // Half an ulp is added and the upper words are gathered: rounds to nearest, ties away from zero. NaNs stay NaNs.
    const __m256i rounded = _mm256_add_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x8000));
    const __m256i words = _mm256_srli_epi32(rounded, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static inline void store(Half* p, Register x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
  }
  inline void to_lanes(float* p) const { _mm256_storeu_ps(p, v); }

  static inline Register broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static inline Register add(Register a, Register b) { return {_mm256_add_ps(a.v, b.v)}; }
  static inline Register sub(Register a, Register b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static inline Register mul(Register a, Register b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static inline Register fma(Register a, Register b, Register c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static inline Register fms(Register a, Register b, Register c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
  static inline Register max(Register a, Register b) { return {_mm256_max_ps(a.v, b.v)}; }
  static inline Register exponent_from_low_bits(Register a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
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
