// Operators over whole matrices on top of the row kernels of bf16_layers_kernels.h: checks and threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "bf16_layers_kernels.h"
#include "bf16_products.h"
#include "instruction_set.h"

namespace megatron_sip {
namespace {

using at::Tensor;

constexpr int64_t kWidthMultiple = 16;
constexpr int64_t kRowsATask = 64;  // fixed, so that sums over rows do not depend on the number of threads

const uint16_t* bits(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }
uint16_t* mutable_bits(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

void check_bf16(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kBFloat16, name, " must be bfloat16, got ", tensor.scalar_type());
  TORCH_CHECK(avx512_bf16_usable(), "this processor has no AVX-512 bfloat16 instructions");
}

int64_t checked_width(const Tensor& tensor, int64_t parts, const char* name) {
  check_bf16(tensor, name);
  TORCH_CHECK_VALUE(tensor.dim() > 0 && tensor.size(-1) > 0 && tensor.size(-1) % (parts * kWidthMultiple) == 0,
                    "the last dimension of ", name, " must be a multiple of ", parts * kWidthMultiple, ", got shape ",
                    tensor.sizes());
  return tensor.size(-1) / parts;
}

template <typename Work>
void for_each_task(int64_t rows, const Work& work) {
  const int64_t tasks = (rows + kRowsATask - 1) / kRowsATask;
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task * kRowsATask;
      work(task, begin, std::min(kRowsATask, rows - begin));
    }
  });
}

int64_t checked_norm_width(const Tensor& x, const Tensor& weight) {
  check_bf16(weight, "weight");
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat,
                   "x must be bfloat16 or float32, got ", x.scalar_type());
  const int64_t width = weight.numel();
  TORCH_CHECK_VALUE(weight.dim() == 1 && width > 0 && width % kWidthMultiple == 0,
                    "weight must be [H] with H a multiple of ", kWidthMultiple, ", got ", weight.sizes());
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == width, "x must be [..., ", width, "], got ", x.sizes());
  return width;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps) {
  const int64_t width = checked_norm_width(x_in, weight_in);
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  const int64_t rows = x.numel() / width;
  Tensor out = at::empty(x.sizes(), weight.options()), inverse_rms = at::empty({rows}, x.options().dtype(at::kFloat));
  uint16_t* out_data = mutable_bits(out);
  float* inverse_data = inverse_rms.mutable_data_ptr<float>();
  const auto norm = [&](const auto* x_data) {
    for_each_task(rows, [&](int64_t, int64_t begin, int64_t count) {
      rms_norm_rows(x_data + begin * width, bits(weight), static_cast<float>(eps), count, width,
                    out_data + begin * width, inverse_data + begin);
    });
  };
  x.scalar_type() == at::kFloat ? norm(x.const_data_ptr<float>()) : norm(bits(x));
  return {out, inverse_rms};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& weight_in,
                                             const Tensor& inverse_rms_in) {
  const int64_t width = checked_norm_width(x_in, weight_in);
  check_bf16(grad_in, "grad");
  TORCH_CHECK_VALUE(grad_in.sizes() == x_in.sizes(), "grad has shape ", grad_in.sizes(), ", x ", x_in.sizes());
  const int64_t rows = x_in.numel() / width, tasks = (rows + kRowsATask - 1) / kRowsATask;
  TORCH_CHECK_TYPE(inverse_rms_in.scalar_type() == at::kFloat, "inverse_rms must be float32, got ",
                   inverse_rms_in.scalar_type());
  TORCH_CHECK_VALUE(inverse_rms_in.dim() == 1 && inverse_rms_in.size(0) == rows, "inverse_rms must be [", rows,
                    "], got ", inverse_rms_in.sizes());
  const Tensor grad = grad_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous();
  const Tensor inverse_rms = inverse_rms_in.contiguous();
  Tensor grad_x = at::empty_like(x), grad_weights = at::zeros({tasks, width}, x.options().dtype(at::kFloat));
  float* grad_weights_data = grad_weights.mutable_data_ptr<float>();
  const float* inverse_data = inverse_rms.const_data_ptr<float>();
  const auto differentiate = [&](const auto* x_data, auto* grad_x_data) {
    for_each_task(rows, [&](int64_t task, int64_t begin, int64_t count) {
      rms_norm_backward_rows(bits(grad) + begin * width, x_data + begin * width, bits(weight), inverse_data + begin,
                             count, width, grad_x_data + begin * width, grad_weights_data + task * width);
    });
  };
  if (x.scalar_type() == at::kFloat) {
    differentiate(x.const_data_ptr<float>(), grad_x.mutable_data_ptr<float>());
  } else {
    differentiate(bits(x), mutable_bits(grad_x));
  }
  return {grad_x, grad_weights.sum(0).to(at::kBFloat16)};
}

// A shape with half the last dimension.
std::vector<int64_t> halved(at::IntArrayRef shape) {
  std::vector<int64_t> half = shape.vec();
  half.back() /= 2;
  return half;
}

Tensor swiglu(const Tensor& gate_up_in) {
  const int64_t width = checked_width(gate_up_in, 2, "gate_up");
  const Tensor gate_up = gate_up_in.contiguous();
  Tensor out = at::empty(halved(gate_up.sizes()), gate_up.options());
  uint16_t* out_data = mutable_bits(out);
  for_each_task(out.numel() / width, [&](int64_t, int64_t begin, int64_t count) {
    swiglu_rows(bits(gate_up) + 2 * begin * width, count, width, out_data + begin * width);
  });
  return out;
}

Tensor swiglu_backward(const Tensor& grad_in, const Tensor& gate_up_in) {
  const int64_t width = checked_width(gate_up_in, 2, "gate_up");
  check_bf16(grad_in, "grad");
  const std::vector<int64_t> shape = halved(gate_up_in.sizes());
  TORCH_CHECK_VALUE(grad_in.sizes() == at::IntArrayRef(shape), "grad must be ", at::IntArrayRef(shape),
                    " for gate_up of shape ", gate_up_in.sizes(), ", got ", grad_in.sizes());
  const Tensor grad = grad_in.contiguous(), gate_up = gate_up_in.contiguous();
  Tensor grad_gate_up = at::empty_like(gate_up);
  uint16_t* out_data = mutable_bits(grad_gate_up);
  for_each_task(grad.numel() / width, [&](int64_t, int64_t begin, int64_t count) {
    swiglu_backward_rows(bits(grad) + begin * width, bits(gate_up) + 2 * begin * width, count, width,
                         out_data + 2 * begin * width);
  });
  return grad_gate_up;
}

Tensor float_product(const Tensor& hidden_in, const Tensor& weight_in) {
  check_bf16(hidden_in, "hidden");
  check_bf16(weight_in, "weight");
  TORCH_CHECK_VALUE(hidden_in.dim() == 2 && weight_in.dim() == 2 && hidden_in.size(1) == weight_in.size(1) &&
                        hidden_in.size(1) > 0 && hidden_in.size(1) % 2 == 0,
                    "hidden must be [T, H] and weight [V, H] with an even H, got ", hidden_in.sizes(), " and ",
                    weight_in.sizes());
  const Tensor hidden = hidden_in.contiguous(), weight = weight_in.contiguous();
  const int64_t rows = hidden.size(0), depth = hidden.size(1), columns = weight.size(0);
  Tensor out = at::empty({rows, columns}, hidden.options().dtype(at::kFloat));
  float* out_data = out.mutable_data_ptr<float>();
  const int64_t panels = rows == 0 ? 0 : (columns + kProjectedColumns - 1) / kProjectedColumns;
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    const Tensor scratch = at::empty({depth / 2 * kProjectedColumns}, at::kInt);
    const TileScope tiles;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t begin = panel * kProjectedColumns;
      project_columns(bits(hidden), bits(weight), rows, depth, columns, begin,
                      std::min(kProjectedColumns, columns - begin), out_data,
                      static_cast<uint32_t*>(scratch.data_ptr()));
    }
  });
  return out;
}

void add_weight_gradient_(Tensor& main_grad, const Tensor& grad_output_in, const Tensor& input_in) {
  check_bf16(grad_output_in, "grad_output");
  check_bf16(input_in, "input");
  TORCH_CHECK_TYPE(main_grad.scalar_type() == at::kFloat, "main_grad must be float32, got ", main_grad.scalar_type());
  TORCH_CHECK_VALUE(grad_output_in.dim() == 2 && input_in.dim() == 2 && main_grad.dim() == 2 &&
                        grad_output_in.size(0) == input_in.size(0) && main_grad.size(0) == grad_output_in.size(1) &&
                        main_grad.size(1) == input_in.size(1),
                    "main_grad must be [N, K], grad_output [T, N] and input [T, K], got ", main_grad.sizes(), ", ",
                    grad_output_in.sizes(), " and ", input_in.sizes());
  TORCH_CHECK_VALUE(
      main_grad.size(0) % kGradientRows == 0 && main_grad.size(1) % kWidthMultiple == 0 && main_grad.is_contiguous(),
      "main_grad must be contiguous with rows a multiple of ", kGradientRows, " and columns of ", kWidthMultiple,
      ", got ", main_grad.sizes(), " with strides ", main_grad.strides());
  const Tensor grad_output = grad_output_in.contiguous(), input = input_in.contiguous();
  const int64_t tokens = input.size(0), width = input.size(1), rows = grad_output.size(1), pairs = (tokens + 1) / 2;
  const Tensor input_pairs = at::empty({pairs, width}, input.options().dtype(at::kInt));
  uint32_t* pair_data = static_cast<uint32_t*>(input_pairs.mutable_data_ptr());
  at::parallel_for(0, pairs, kRowsATask, [&](int64_t begin, int64_t end) {
    interleave_token_pairs(bits(input), tokens, width, begin, end, pair_data);
  });
  float* gradient = main_grad.mutable_data_ptr<float>();
  // Tokens whose inputs stay in the second-level cache while all rows pass, and rows that are transposed together,
  // since a few bytes of every token's gradient are slow to fetch.
  constexpr int64_t kTokens = 1024, kRows = 4 * kGradientRows;
  at::parallel_for(0, rows / kGradientRows, 1, [&](int64_t first_panel, int64_t last_panel) {
    const Tensor scratch = at::empty({kRows * kTokens}, at::kBFloat16);
    const TileScope tiles;
    const int64_t end = last_panel * kGradientRows;
    for (int64_t t = 0; t < tokens; t += kTokens) {
      for (int64_t row = first_panel * kGradientRows; row < end; row += kRows) {
        add_weight_gradient_rows(bits(grad_output) + row, pair_data, tokens, rows, width, t,
                                 std::min(tokens, t + kTokens), std::min(kRows, end - row), gradient + row * width,
                                 mutable_bits(scratch));
      }
    }
  });
}

Tensor rotate(const Tensor& x_in, const Tensor& cosines_in, const Tensor& sines_in, bool back) {
  check_bf16(x_in, "x");
  const int64_t dim = x_in.dim() == 3 ? x_in.size(2) : 0;
  TORCH_CHECK_VALUE(dim > 0 && dim % (2 * kWidthMultiple) == 0, "x must be [S, H, D] with D a multiple of ",
                    2 * kWidthMultiple, ", got ", x_in.sizes());
  for (const Tensor& table : {cosines_in, sines_in}) {
    TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, "cosines and sines must be float32, got ", table.scalar_type());
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) == x_in.size(0) && table.size(1) == dim / 2,
                      "cosines and sines must be [", x_in.size(0), ", ", dim / 2, "], got ", table.sizes());
  }
  const Tensor x = x_in.stride(2) == 1 ? x_in : x_in.contiguous();
  const Tensor cosines = cosines_in.contiguous(), sines = sines_in.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  const int64_t heads = x.size(1);
  uint16_t* out_data = mutable_bits(out);
  for_each_task(x.size(0), [&](int64_t, int64_t begin, int64_t count) {
    rotate_heads(bits(x) + begin * x.stride(0), x.stride(0), x.stride(1),
                 cosines.const_data_ptr<float>() + begin * dim / 2, sines.const_data_ptr<float>() + begin * dim / 2,
                 back ? -1.0f : 1.0f, count, heads, dim, out_data + begin * heads * dim);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_sip, library) {
  library.def("bf16_layers_supported() -> bool", [] { return avx512_bf16_usable(); });
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse_rms) -> (Tensor, Tensor)");
  library.def("swiglu(Tensor gate_up) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  library.def("float_product(Tensor hidden, Tensor weight) -> Tensor");
  library.def("add_weight_gradient_(Tensor(a!) main_grad, Tensor grad_output, Tensor input) -> ()");
  library.def("rotate(Tensor x, Tensor cosines, Tensor sines, bool back) -> Tensor");
}

TORCH_LIBRARY_IMPL(megatron_sip, CPU, library) {
  library.impl("rms_norm", &rms_norm);
  library.impl("rms_norm_backward", &rms_norm_backward);
  library.impl("swiglu", &swiglu);
  library.impl("swiglu_backward", &swiglu_backward);
  library.impl("float_product", &float_product);
  library.impl("add_weight_gradient_", &add_weight_gradient_);
  library.impl("rotate", &rotate);
}

}  // namespace megatron_sip
