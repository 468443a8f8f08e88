// The log-prob operators on CUDA: checks and bookkeeping around the kernels of logprob_cuda.cu.
#include "logprob_cuda.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "logprob_op.h"

namespace megatron_sip {
namespace {

using at::Tensor;

DeviceRows device_rows(const Tensor& logits, int64_t columns) {
  return {logit_type(logits), logits.const_data_ptr(), logits.size(0), logits.size(1), columns};
}

std::tuple<Tensor, Tensor> row_statistics(const Tensor& logits, int64_t columns) {
  check_logits(logits, columns);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor reference = at::empty({logits.size(0)}, logits.options().dtype(at::kDouble));
  const Tensor sum = at::empty_like(reference);
  C10_CUDA_CHECK(launch_statistics(device_rows(logits, columns), reference.data_ptr<double>(), sum.data_ptr<double>(),
                                   c10::cuda::getCurrentCUDAStream()));
  return {reference, sum};
}

void write_gradient(const Tensor& out, const Tensor& logits, const Tensor& logit_rows, const Tensor& targets_any,
                    const Tensor& logprobs_any, const Tensor& log_normaliser_any, const Tensor& grad_any, Shard shard) {
  check_gradient(logits, logit_rows, targets_any, logprobs_any, log_normaliser_any, grad_any, shard.columns);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto [sorted, order] = at::sort(logit_rows, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor begin = at::searchsorted(sorted, at::arange(logits.size(0) + 1, logit_rows.options()));
  const Tensor targets = targets_any.contiguous(), logprobs = logprobs_any.contiguous();
  const Tensor log_normaliser = log_normaliser_any.contiguous(), grad = grad_any.contiguous();
  const DeviceEntries entries{begin.const_data_ptr<int64_t>(),   order.const_data_ptr<int64_t>(),
                              targets.const_data_ptr<int64_t>(), logprobs.const_data_ptr<double>(),
                              grad.const_data_ptr<double>(),     shard.vocab_start};
  C10_CUDA_CHECK(launch_gradient(device_rows(logits, shard.columns), entries, log_normaliser.const_data_ptr<double>(),
                                 out.data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

Tensor gradient(const Tensor& logits, const Tensor& logit_rows, const Tensor& targets, const Tensor& logprobs,
                const Tensor& log_normaliser, const Tensor& grad, int64_t vocab_start, int64_t columns) {
  Tensor out = at::empty_like(logits);
  write_gradient(out, logits, logit_rows, targets, logprobs, log_normaliser, grad, {vocab_start, columns});
  return out;
}

void gradient_(Tensor& logits, const Tensor& logit_rows, const Tensor& targets, const Tensor& logprobs,
               const Tensor& log_normaliser, const Tensor& grad, int64_t vocab_start, int64_t columns) {
  write_gradient(logits, logits, logit_rows, targets, logprobs, log_normaliser, grad, {vocab_start, columns});
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_sip, CUDA, library) {
  library.impl("row_statistics", &row_statistics);
  library.impl("gradient", &gradient);
  library.impl("gradient_", &gradient_);
}

}  // namespace megatron_sip
