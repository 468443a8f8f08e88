// Pieces of the AVX-512 bfloat16 kernels. Include it after MEGATRON_SIP_TARGET_BEGIN and the headers <immintrin.h>,
// <cstdint> and <cstring>: its functions are compiled for the instruction set switched on there.
#pragma once

namespace megatron_sip {
namespace {

constexpr int64_t kLanes = 16;
constexpr float kLog2E = 1.4426950408889634f;

// c [rows, 16 * VECTORS] (+)= a [rows, 2 * pairs] times b, whose rows 2p and 2p + 1 are interleaved in line p.
template <int ROWS, int VECTORS>
void multiply_tile(const uint16_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc, int64_t pairs,
                   bool accumulate) {
  __m512 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] = accumulate ? _mm512_loadu_ps(c + r * ldc + v * kLanes) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i columns[VECTORS];
    for (int v = 0; v < VECTORS; ++v) columns[v] = _mm512_loadu_si512(b + p * ldb + v * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * lda + 2 * p, sizeof(pair));
      const __m512i row = _mm512_set1_epi32(pair);
      for (int v = 0; v < VECTORS; ++v) {
        sums[r][v] =
            _mm512_dpbf16_ps(sums[r][v], reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(columns[v]));
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * ldc + v * kLanes, sums[r][v]);
}

// 2^x to 3e-6 relative; 0 below -150, NaN stays NaN.
inline __m512 exp2_lanes(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // of a NaN and a number max gives its second operand
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.33336498402e-3f);
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(9.61812910763e-3f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(5.55041086648e-2f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(2.40226506959e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(6.93147180560e-1f));
  sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

inline float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline void store_bf16(uint16_t* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline __m512 load_bf16(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

}  // namespace
}  // namespace megatron_sip
