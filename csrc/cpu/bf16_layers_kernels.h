// What a transformer layer does between its matrix products, and the vocabulary projection, in bfloat16 with float32
// inside: one pass over memory where torch takes one a step. Matrices are contiguous; widths are multiples of 16.
#pragma once

#include <cstdint>

namespace megatron_sip {

// out = x * inverse_rms * weight of each row, rounded once; inverse_rms [rows] is kept for backward. T: uint16_t
// holding bfloat16, or float.
template <typename T>
void rms_norm_rows(const T* x, const uint16_t* weight, float eps, int64_t rows, int64_t width, uint16_t* out,
                   float* inverse_rms);

// Writes grad_x and adds to grad_weight, float32 [width].
template <typename T>
void rms_norm_backward_rows(const uint16_t* grad, const T* x, const uint16_t* weight, const float* inverse_rms,
                            int64_t rows, int64_t width, T* grad_x, float* grad_weight);

// out [rows, width] = silu(gate) * up, rounded after each, as torch does; gate_up is [rows, 2 * width], gate first.
void swiglu_rows(const uint16_t* gate_up, int64_t rows, int64_t width, uint16_t* out);

void swiglu_backward_rows(const uint16_t* grad, const uint16_t* gate_up, int64_t rows, int64_t width,
                          uint16_t* grad_gate_up);

// Columns of a product in one call of `project_columns`.
constexpr int64_t kProjectedColumns = 256;

// out[:, begin .. begin + count) of hidden [rows, depth] times weight [columns, depth] transposed, float32, row stride
// `columns`; count at most kProjectedColumns, depth even. `scratch` holds depth / 2 * kProjectedColumns values.
void project_columns(const uint16_t* hidden, const uint16_t* weight, int64_t rows, int64_t depth, int64_t columns,
                     int64_t begin, int64_t count, float* out, uint32_t* scratch);

// What the rows of a weight's gradient must be a multiple of.
constexpr int64_t kGradientRows = 32;

// Rows `begin` to `end` of the pairs of [tokens, width], interleaved, 16 columns after 16 columns: [width / 16, pairs,
// 16].
void interleave_token_pairs(const uint16_t* from, int64_t tokens, int64_t width, int64_t begin, int64_t end,
                            uint32_t* to);

// Adds the share of tokens `first` to `last` (`first` even) to `rows` rows (a multiple of 32) of a weight's gradient,
// float32 [rows, input_width]: as many columns of grad_output [tokens, output_width], which begin there, transposed,
// times the input, of which `interleave_token_pairs` made `input_pairs`. `scratch` holds rows * (last - first rounded
// up to a multiple of 32) values. Needs the thread's TileScope.
void add_weight_gradient_rows(const uint16_t* grad_output, const uint32_t* input_pairs, int64_t tokens,
                              int64_t output_width, int64_t input_width, int64_t first, int64_t last, int64_t rows,
                              float* gradient, uint16_t* scratch);

// Turns each head of each token: (first half, second half) to (first cos - second sin, second cos + first sin). Strides
// are in elements, a head's own elements lie side by side; cosines and sines are [tokens, dim / 2], dim a multiple of
// 32; out is [tokens, heads, dim]. `sign` -1 turns back.
void rotate_heads(const uint16_t* x, int64_t token_stride, int64_t head_stride, const float* cosines,
                  const float* sines, float sign, int64_t tokens, int64_t heads, int64_t dim, uint16_t* out);

}  // namespace megatron_sip
