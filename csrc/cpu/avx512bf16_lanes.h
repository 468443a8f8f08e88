// Pieces of the AVX-512 bfloat16 kernels. Include it after MEGATRON_SIP_TARGET_BEGIN and the headers <immintrin.h>
// and <cstdint>: its functions are compiled for the instruction set switched on there.
#pragma once

namespace megatron_sip {
namespace {

constexpr int64_t kLanes = 16;
constexpr float kLog2E = 1.4426950408889634f;

// 2^x by a polynomial for 2^f on [0, 1), lowest coefficient first. 0 for -inf and far below; NaN stays NaN.
template <int TERMS>
inline __m512 exp2_by(const float (&polynomial)[TERMS], __m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 sum = _mm512_set1_ps(polynomial[TERMS - 1]);
#pragma GCC unroll 8
  for (int i = TERMS - 2; i >= 0; --i) sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(polynomial[i]));
  return _mm512_scalef_ps(sum, x);
}

// 2^x to 2e-7 relative.
inline __m512 exp2_lanes(__m512 x) {
  static constexpr float kPower[] = {1.0f,           6.931510568e-1f, 2.401658148e-1f, 5.580065399e-2f, 9.010603651e-3f,
                                     1.871729386e-3f};
  return exp2_by(kPower, x);
}

// 2^x to 8e-5 relative, a twentieth of what rounding to bfloat16 costs.
inline __m512 rough_exp2_lanes(__m512 x) {
  static constexpr float kPower[] = {9.999251962e-1f, 6.958312392e-1f, 2.260741293e-1f, 7.801982760e-2f};
  return exp2_by(kPower, x);
}

inline void store_bf16(uint16_t* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline __m512 load_bf16(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Two rows of 16 floats as bfloat16, element by element interleaved, `even` in the lower halves.
inline __m512i interleave_bf16(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// 16 bfloat16 as the lower halves of 32 bits each; zeros if they are not there.
inline __m512i load_halves(const uint16_t* from, bool there) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there ? 0xFFFF : 0, from));
}

// 16 bfloat16 of two rows each, element by element interleaved.
inline __m512i interleave_rows(const uint16_t* even, bool even_there, const uint16_t* odd, bool odd_there) {
  return _mm512_or_si512(load_halves(even, even_there), _mm512_slli_epi32(load_halves(odd, odd_there), 16));
}

// Transposes 16 lines of 16 elements of 32 bits.
inline void transpose_lines(__m512i (&line)[kLanes]) {
  __m512i part[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    part[i] = _mm512_unpacklo_epi32(line[i], line[i + 1]);
    part[i + 1] = _mm512_unpackhi_epi32(line[i], line[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      line[i + 2 * j] = _mm512_unpacklo_epi64(part[i + j], part[i + 2 + j]);
      line[i + 2 * j + 1] = _mm512_unpackhi_epi64(part[i + j], part[i + 2 + j]);
    }
  }
  // Line 4 a + b now holds, in its 128-bit piece c, column 4 c + b of lines 4 a to 4 a + 3.
  for (int b = 0; b < 4; ++b) {
    const __m512i even_low = _mm512_shuffle_i32x4(line[b], line[4 + b], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(line[b], line[4 + b], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(line[8 + b], line[12 + b], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(line[8 + b], line[12 + b], 0xdd);
    part[b] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    part[4 + b] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    part[8 + b] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    part[12 + b] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  for (int i = 0; i < kLanes; ++i) line[i] = part[i];
}

}  // namespace
}  // namespace megatron_sip
