// The kernels of bf16_layers_kernels.h for AVX-512 with bfloat16 dot products.
#include "bf16_layers_kernels.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "bf16_products.h"
#include "instruction_set.h"

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

// kProjectedColumns weight rows of `depth` as a right operand, chunk after chunk. Columns that are not there are those
// of the last one that is.
void pair_weight_rows(const uint16_t* weight, int64_t depth, int64_t count, uint32_t* to) {
  for (int64_t n = 0; n < kProjectedColumns; n += kLanes) {
    for (int64_t p = 0; p < depth / 2; p += kLanes) {
      const int64_t pairs = std::min(kLanes, depth / 2 - p);
      const __mmask16 there = static_cast<__mmask16>((1u << pairs) - 1);
      __m512i lines[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        lines[lane] = _mm512_maskz_loadu_epi32(there, weight + std::min(n + lane, count - 1) * depth + 2 * p);
      }
      transpose_lines(lines);
      for (int64_t i = 0; i < pairs; ++i) _mm512_storeu_si512(to + (n / kLanes * depth / 2 + p + i) * kLanes, lines[i]);
    }
  }
}

}  // namespace

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
  const RightOperand weights = {scratch, kLanes, depth / 2 * kLanes};
  if (count == kProjectedColumns) {
    multiply({hidden, depth}, weights, out + begin, columns, rows, count, depth / 2, false);
    return;
  }
  float tile[kLanes * kProjectedColumns];
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t some = std::min(kLanes, rows - r);
    multiply({hidden + r * depth, depth}, weights, tile, kProjectedColumns, some, kProjectedColumns, depth / 2, false);
    for (int64_t i = 0; i < some; ++i) {
      std::copy_n(tile + i * kProjectedColumns, count, out + (r + i) * columns + begin);
    }
  }
}

void interleave_token_pairs(const uint16_t* from, int64_t tokens, int64_t width, int64_t begin, int64_t end,
                            uint32_t* to) {
  const int64_t pairs = (tokens + 1) / 2;
  for (int64_t pair = begin; pair < end; ++pair) {
    const uint16_t* even = from + 2 * pair * width;
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512i line = interleave_rows(even + i, true, even + width + i, 2 * pair + 1 < tokens);
      _mm512_storeu_si512(to + i * pairs + pair * kLanes, line);
    }
  }
}

void add_weight_gradient_rows(const uint16_t* grad_output, const uint32_t* input_pairs, int64_t tokens,
                              int64_t output_width, int64_t input_width, int64_t first, int64_t last, int64_t rows,
                              float* gradient, uint16_t* scratch) {
  const int64_t pairs = (tokens + 1) / 2;
  __m512i lines[kLanes];
  for (int64_t t = first; t < last; t += 2 * kLanes) {
    for (int64_t n = 0; n < rows; n += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const uint16_t* even = grad_output + (t + 2 * i) * output_width + n;
        lines[i] = interleave_rows(even, t + 2 * i < last, even + output_width, t + 2 * i + 1 < last);
      }
      transpose_lines(lines);
      uint16_t* to = scratch + (t - first) * rows + n * 2 * kLanes;
      for (int64_t i = 0; i < kLanes; ++i) _mm512_storeu_si512(to + i * 2 * kLanes, lines[i]);
    }
  }
  constexpr int64_t kPairs = 256;  // of which 32 rows stay in the first-level cache
  for (int64_t p = first / 2; p < (last + 1) / 2; p += kPairs) {
    const LeftOperand grads = {scratch + (2 * p - first) * rows, 2 * kLanes, 2 * kLanes * rows};
    multiply(grads, {input_pairs + p * kLanes, kLanes, pairs * kLanes}, gradient, input_width, rows, input_width,
             std::min(kPairs, (last + 1) / 2 - p), true);
  }
}

void rotate_heads(const uint16_t* x, int64_t token_stride, int64_t head_stride, const float* cosines,
                  const float* sines, float sign, int64_t tokens, int64_t heads, int64_t dim, uint16_t* out) {
  const __m512 signs = _mm512_set1_ps(sign);
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < tokens; ++t, cosines += half, sines += half) {
    for (int64_t h = 0; h < heads; ++h, out += dim) {
      const uint16_t* head = x + t * token_stride + h * head_stride;
      for (int64_t d = 0; d < half; d += kLanes) {
        const __m512 first = load_bf16(head + d), second = load_bf16(head + half + d);
        const __m512 cosine = _mm512_loadu_ps(cosines + d), sine = _mm512_mul_ps(_mm512_loadu_ps(sines + d), signs);
        store_bf16(out + d, _mm512_fnmadd_ps(second, sine, _mm512_mul_ps(first, cosine)));
        store_bf16(out + half + d, _mm512_fmadd_ps(first, sine, _mm512_mul_ps(second, cosine)));
      }
    }
  }
}

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_END
