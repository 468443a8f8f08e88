#include "widened_bfloat16.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_cpu_dispatch.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_cpu_dispatch.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/baddbmm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace megatron_sip {
namespace {

using at::Scalar;
using at::Tensor;

// So much of a product's right side is held in float32 at a time, 4 MiB.
constexpr int64_t kNumbersABlock = int64_t{1} << 20;

bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

Tensor wide(const Tensor& tensor) { return tensor.to(at::kFloat); }

Tensor narrow(const Tensor& tensor) { return tensor.to(at::kBFloat16); }

// Masks of numbers are in the query's type, others boolean.
std::optional<Tensor> wide(const std::optional<Tensor>& mask) {
  return mask.has_value() && is_bfloat16(*mask) ? wide(*mask) : mask;
}

// `rank` is 2, or 3 with a batch.
bool is_product(const Tensor& left, const Tensor& right, int64_t rank) {
  return is_bfloat16(left) && is_bfloat16(right) && left.dim() == rank && right.dim() == rank &&
         left.size(-1) == right.size(-2) && (rank == 2 || left.size(0) == right.size(0)) && left.size(-2) > 1;
}

// A large right side goes by blocks: of its rows, which are summed up, or of its columns, whichever lie together.
Tensor product(const Tensor& left, const Tensor& right) {
  const int64_t inner = right.size(0), columns = right.size(1);
  if (right.numel() <= kNumbersABlock) return narrow(at::cpu::mm(wide(left), wide(right)));
  if (right.stride(0) >= right.stride(1)) {
    const int64_t step = std::max<int64_t>(1, kNumbersABlock / columns);
    Tensor sum;
    for (int64_t k = 0; k < inner; k += step) {
      const int64_t count = std::min(step, inner - k);
      const Tensor left_block = wide(left.narrow(1, k, count)), right_block = wide(right.narrow(0, k, count));
      if (k == 0) {
        sum = at::cpu::mm(left_block, right_block);
      } else {
        at::cpu::addmm_(sum, left_block, right_block);
      }
    }
    return narrow(sum);
  }
  const Tensor wide_left = wide(left), out = at::empty({left.size(0), columns}, left.options());
  const int64_t step = std::max<int64_t>(1, kNumbersABlock / inner);
  for (int64_t n = 0; n < columns; n += step) {
    const int64_t count = std::min(step, columns - n);
    out.narrow(1, n, count).copy_(at::cpu::mm(wide_left, wide(right.narrow(1, n, count))));
  }
  return out;
}

Tensor mm(const Tensor& left, const Tensor& right) {
  return is_product(left, right, 2) ? product(left, right) : at::cpu::mm(left, right);
}

Tensor& mm_out(const Tensor& left, const Tensor& right, Tensor& out) {
  const bool fits = is_product(left, right, 2) && is_bfloat16(out) && out.dim() == 2 && out.size(0) == left.size(0) &&
                    out.size(1) == right.size(1);
  if (!fits) return at::cpu::mm_out(out, left, right);
  return out.copy_(product(left, right));
}

Tensor bmm(const Tensor& left, const Tensor& right) {
  return is_product(left, right, 3) ? narrow(at::cpu::bmm(wide(left), wide(right))) : at::cpu::bmm(left, right);
}

Tensor addmm(const Tensor& bias, const Tensor& left, const Tensor& right, const Scalar& beta, const Scalar& alpha) {
  if (!is_bfloat16(bias) || !is_product(left, right, 2)) return at::cpu::addmm(bias, left, right, beta, alpha);
  return narrow(at::cpu::addmm(wide(bias), wide(left), wide(right), beta, alpha));
}

Tensor baddbmm(const Tensor& bias, const Tensor& left, const Tensor& right, const Scalar& beta, const Scalar& alpha) {
  if (!is_bfloat16(bias) || !is_product(left, right, 3)) return at::cpu::baddbmm(bias, left, right, beta, alpha);
  return narrow(at::cpu::baddbmm(wide(bias), wide(left), wide(right), beta, alpha));
}

std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value, double dropout,
                                     bool causal, const std::optional<Tensor>& mask, std::optional<double> scale) {
  const auto attend = at::cpu::_scaled_dot_product_flash_attention_for_cpu;
  if (!is_bfloat16(query) || !is_bfloat16(key) || !is_bfloat16(value)) {
    return attend(query, key, value, dropout, causal, mask, scale);
  }
  const auto [output, log_sum_exp] = attend(wide(query), wide(key), wide(value), dropout, causal, wide(mask), scale);
  return {narrow(output), log_sum_exp};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& output,
                                                      const Tensor& log_sum_exp, double dropout, bool causal,
                                                      const std::optional<Tensor>& mask, std::optional<double> scale) {
  const auto differentiate = at::cpu::_scaled_dot_product_flash_attention_for_cpu_backward;
  if (!is_bfloat16(grad) || !is_bfloat16(query) || !is_bfloat16(key) || !is_bfloat16(value)) {
    return differentiate(grad, query, key, value, output, log_sum_exp, dropout, causal, mask, scale);
  }
  const auto [grad_query, grad_key, grad_value] = differentiate(
      wide(grad), wide(query), wide(key), wide(value), wide(output), log_sum_exp, dropout, causal, wide(mask), scale);
  return {narrow(grad_query), narrow(grad_key), narrow(grad_value)};
}

// torch warns of every replaced kernel.
struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

WidenedBFloat16::WidenedBFloat16() : library_(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__) {
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  library_.impl("mm", TORCH_FN(mm));
  library_.impl("mm.out", TORCH_FN(mm_out));
  library_.impl("bmm", TORCH_FN(bmm));
  library_.impl("addmm", TORCH_FN(addmm));
  library_.impl("baddbmm", TORCH_FN(baddbmm));
  library_.impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_FN(attention));
  library_.impl("_scaled_dot_product_flash_attention_for_cpu_backward", TORCH_FN(attention_backward));
}

}  // namespace megatron_sip
