// What a transformer layer does between its matrix products, and the vocabulary projection, in bfloat16 with float32
// inside: one pass over memory where torch takes one a step. Matrices are contiguous; widths are multiples of 16.
#pragma once

#include <cstdint>

namespace megatron_sip {

bool bf16_layer_kernels_supported();

// out = x * inverse_rms * weight of each row, rounded once; inverse_rms [rows] is kept for backward. T: uint16_t holding
// bfloat16, or float.
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
constexpr int64_t kProjectedColumns = 64;

// out[:, begin .. begin + count) of hidden [rows, depth] times weight [columns, depth] transposed, float32, row stride
// `columns`; count at most kProjectedColumns, depth even. `scratch` holds depth / 2 * kProjectedColumns values.
void project_columns(const uint16_t* hidden, const uint16_t* weight, int64_t rows, int64_t depth, int64_t columns,
                     int64_t begin, int64_t count, float* out, uint32_t* scratch);

}  // namespace megatron_sip
