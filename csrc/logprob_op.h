// What the CPU and the CUDA operators share: the checks of their arguments and the range of a shard; their
// schemas are in megatron_sip/kernels/logprob_ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "logits.h"

namespace megatron_sip {

// Which columns of a shard count (`columns` from its first), and the token id of the first.
struct Shard {
  int64_t vocab_start;
  int64_t columns;

  bool owns(int64_t token) const { return token >= vocab_start && token < vocab_start + columns; }
};

inline LogitType logit_type(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat: return LogitType::kFloat32;
    case at::kBFloat16: return LogitType::kBFloat16;
    case at::kHalf: return LogitType::kFloat16;
    default: return LogitType::kFloat64;
  }
}

inline void check_logits(const at::Tensor& logits, int64_t columns) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [T, V], got shape ", logits.sizes());
  TORCH_CHECK_VALUE(logits.is_contiguous(), "logits must be contiguous, got strides ", logits.strides(), " for shape ",
                    logits.sizes());
  const auto type = logits.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble,
                   "logits must be float32, bfloat16, float16 or float64, got ", type);
  TORCH_CHECK_VALUE(columns >= 0 && columns <= logits.size(1), "columns must lie in [0, ", logits.size(1), "], got ",
                    columns);
}

inline void check_vector(const at::Tensor& tensor, const char* name, at::ScalarType type, int64_t length,
                         const at::Tensor& logits) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == length, name, " must have shape [", length, "], got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), name, " is on ", tensor.device(), ", the logits on ",
                    logits.device());
}

inline void check_gradient(const at::Tensor& logits, const at::Tensor& logit_rows, const at::Tensor& targets,
                           const at::Tensor& logprobs, const at::Tensor& log_normaliser, const at::Tensor& grad,
                           int64_t columns) {
  check_logits(logits, columns);
  check_vector(logit_rows, "logit_rows", at::kLong, targets.numel(), logits);
  check_vector(targets, "targets", at::kLong, targets.numel(), logits);
  check_vector(logprobs, "logprobs", at::kDouble, targets.numel(), logits);
  check_vector(grad, "grad", at::kDouble, targets.numel(), logits);
  check_vector(log_normaliser, "log_normaliser", at::kDouble, logits.size(0), logits);
}

}  // namespace megatron_sip
