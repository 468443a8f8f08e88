// The kernels of bf16_layers_kernels.h for AVX-512 with bfloat16 dot products.
#include "bf16_layers_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "instruction_set.h"

// GCC 12 and 13 take the intrinsics' own "undefined" operands for uninitialised variables (GCC bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

MEGATRON_SIP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

#include "avx512bf16_lanes.h"

namespace megatron_sip {
namespace {

inline __m512 load(const uint16_t* from) { return load_bf16(from); }
inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(uint16_t* to, __m512 values) { store_bf16(to, values); }
inline void store(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

inline __m512 round_to_bf16(__m512 values) {
  const __m512i wide = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline __m512 sigmoid_lanes(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp2_lanes(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)))));
}

// Lines of 16 pairs from 16 weight rows each: the transposed weight as a right operand. Columns that are not there are
// those of the last one that is.
void pair_weight_rows(const uint16_t* weight, int64_t depth, int64_t count, uint32_t* to) {
  alignas(64) int32_t offsets[kLanes];
  for (int64_t n = 0; n < kProjectedColumns; n += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      offsets[lane] = static_cast<int32_t>(std::min(n + lane, count - 1) * depth / 2);
    }
    const __m512i lanes = _mm512_load_si512(offsets);
    for (int64_t p = 0; p < depth / 2; ++p) {
      const __m512i pairs = _mm512_i32gather_epi32(lanes, reinterpret_cast<const int*>(weight) + p, 4);
      _mm512_storeu_si512(to + p * kProjectedColumns + n, pairs);
    }
  }
}

template <int ROWS>
void project_rows(const uint16_t* hidden, const uint32_t* pairs, int64_t depth, int64_t columns, int64_t count,
                  float* out) {
  constexpr int kVectors = kProjectedColumns / kLanes;
  if (count == kProjectedColumns) {
    multiply_tile<ROWS, kVectors>(hidden, depth, pairs, kProjectedColumns, out, columns, depth / 2, false);
    return;
  }
  float tile[ROWS * kProjectedColumns];
  multiply_tile<ROWS, kVectors>(hidden, depth, pairs, kProjectedColumns, tile, kProjectedColumns, depth / 2, false);
  for (int r = 0; r < ROWS; ++r) std::copy_n(tile + r * kProjectedColumns, count, out + r * columns);
}

}  // namespace

bool bf16_layer_kernels_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
}

template <typename T>
void rms_norm_rows(const T* x, const uint16_t* weight, float eps, int64_t rows, int64_t width, uint16_t* out,
                   float* inverse_rms) {
  for (int64_t r = 0; r < rows; ++r, x += width, out += width) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 value = load(x + i);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float inverse = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(width) + eps);
    const __m512 factor = _mm512_set1_ps(inverse);
    for (int64_t i = 0; i < width; i += kLanes) {
      store_bf16(out + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), factor), load_bf16(weight + i)));
    }
    inverse_rms[r] = inverse;
  }
}

template <typename T>
void rms_norm_backward_rows(const uint16_t* grad, const T* x, const uint16_t* weight, const float* inverse_rms,
                            int64_t rows, int64_t width, T* grad_x, float* grad_weight) {
  for (int64_t r = 0; r < rows; ++r, grad += width, x += width, grad_x += width) {
    const __m512 inverse = _mm512_set1_ps(inverse_rms[r]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 product = _mm512_mul_ps(load_bf16(grad + i), load(x + i));
      sum = _mm512_fmadd_ps(product, load_bf16(weight + i), sum);
      _mm512_storeu_ps(grad_weight + i, _mm512_fmadd_ps(product, inverse, _mm512_loadu_ps(grad_weight + i)));
    }
    const float cube = inverse_rms[r] * inverse_rms[r] * inverse_rms[r];
    const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * cube / static_cast<float>(width));
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(load_bf16(grad + i), load_bf16(weight + i)), inverse);
      store(grad_x + i, _mm512_fnmadd_ps(load(x + i), along, scaled));
    }
  }
}

template void rms_norm_rows(const uint16_t*, const uint16_t*, float, int64_t, int64_t, uint16_t*, float*);
template void rms_norm_rows(const float*, const uint16_t*, float, int64_t, int64_t, uint16_t*, float*);
template void rms_norm_backward_rows(const uint16_t*, const uint16_t*, const uint16_t*, const float*, int64_t, int64_t,
                                     uint16_t*, float*);
template void rms_norm_backward_rows(const uint16_t*, const float*, const uint16_t*, const float*, int64_t, int64_t,
                                     float*, float*);

void swiglu_rows(const uint16_t* gate_up, int64_t rows, int64_t width, uint16_t* out) {
  for (int64_t r = 0; r < rows; ++r, gate_up += 2 * width, out += width) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 gate = load_bf16(gate_up + i);
      const __m512 activated = round_to_bf16(_mm512_mul_ps(gate, sigmoid_lanes(gate)));
      store_bf16(out + i, _mm512_mul_ps(activated, load_bf16(gate_up + width + i)));
    }
  }
}

void swiglu_backward_rows(const uint16_t* grad, const uint16_t* gate_up, int64_t rows, int64_t width,
                          uint16_t* grad_gate_up) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t r = 0; r < rows; ++r, grad += width, gate_up += 2 * width, grad_gate_up += 2 * width) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 gate = load_bf16(gate_up + i), up = load_bf16(gate_up + width + i), out = load_bf16(grad + i);
      const __m512 sigmoid = sigmoid_lanes(gate), activated = _mm512_mul_ps(gate, sigmoid);
      // silu'(x) = s + x s (1 - s)
      const __m512 slope = _mm512_fmadd_ps(activated, _mm512_sub_ps(one, sigmoid), sigmoid);
      store_bf16(grad_gate_up + i, _mm512_mul_ps(_mm512_mul_ps(out, up), slope));
      store_bf16(grad_gate_up + width + i, _mm512_mul_ps(out, activated));
    }
  }
}

void project_columns(const uint16_t* hidden, const uint16_t* weight, int64_t rows, int64_t depth, int64_t columns,
                     int64_t begin, int64_t count, float* out, uint32_t* scratch) {
  pair_weight_rows(weight + begin * depth, depth, count, scratch);
  out += begin;
  constexpr int64_t kRows = 6;  // as many as leave room for their sums in the registers
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    project_rows<kRows>(hidden + r * depth, scratch, depth, columns, count, out + r * columns);
  }
  for (; r < rows; ++r) project_rows<1>(hidden + r * depth, scratch, depth, columns, count, out + r * columns);
}

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_END

#else

#include <stdexcept>

namespace megatron_sip {

// The operators check for support first, so nothing below is ever called.
bool bf16_layer_kernels_supported() { return false; }
template <typename T>
void rms_norm_rows(const T*, const uint16_t*, float, int64_t, int64_t, uint16_t*, float*) {
  throw std::logic_error("no bfloat16 layer kernels for this processor");
}
template <typename T>
void rms_norm_backward_rows(const uint16_t*, const T*, const uint16_t*, const float*, int64_t, int64_t, T*, float*) {
  throw std::logic_error("no bfloat16 layer kernels for this processor");
}
template void rms_norm_rows(const uint16_t*, const uint16_t*, float, int64_t, int64_t, uint16_t*, float*);
template void rms_norm_rows(const float*, const uint16_t*, float, int64_t, int64_t, uint16_t*, float*);
template void rms_norm_backward_rows(const uint16_t*, const uint16_t*, const uint16_t*, const float*, int64_t, int64_t,
                                     uint16_t*, float*);
template void rms_norm_backward_rows(const uint16_t*, const float*, const uint16_t*, const float*, int64_t, int64_t,
                                     float*, float*);
void swiglu_rows(const uint16_t*, int64_t, int64_t, uint16_t*) {
  throw std::logic_error("no bfloat16 layer kernels for this processor");
}
void swiglu_backward_rows(const uint16_t*, const uint16_t*, int64_t, int64_t, uint16_t*) {
  throw std::logic_error("no bfloat16 layer kernels for this processor");
}
void project_columns(const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, int64_t, int64_t, float*, uint32_t*) {
  throw std::logic_error("no bfloat16 layer kernels for this processor");
}

}  // namespace megatron_sip

#endif
