// The log-prob operators on CPU: rows are spread over torch's threads, each row stays with one of them.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "logprob_op.h"
#include "row_kernels.h"

namespace megatron_sip {
namespace {

using at::Tensor;

// Rows of raw bytes, so that one code path serves all logit types.
struct Rows {
  char* data;
  int64_t count;
  int64_t width;       // elements
  int64_t item_bytes;  // of an element

  explicit Rows(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data_ptr())),
        count(tensor.size(0)),
        width(tensor.size(1)),
        item_bytes(tensor.element_size()) {}

  char* row(int64_t index) const { return data + index * width * item_bytes; }
  void clear(int64_t index, int64_t first_column) const {
    std::memset(row(index) + first_column * item_bytes, 0, (width - first_column) * item_bytes);
  }
};

// Threads take whole rows; a task should be worth some tens of microseconds.
int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(columns, 1)); }

void check_rows(const Tensor& logit_rows, int64_t rows) {
  const int64_t* data = logit_rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < logit_rows.numel(); ++i) {
    TORCH_CHECK_VALUE(data[i] >= 0 && data[i] < rows, "logit_rows[", i, "] must lie in [0, ", rows, "), got ", data[i]);
  }
}

std::tuple<Tensor, Tensor> row_statistics(const Tensor& logits, int64_t columns) {
  check_logits(logits, columns);
  const Rows rows(logits);
  const Tensor reference = at::empty({rows.count}, logits.options().dtype(at::kDouble));
  const Tensor sum = at::empty_like(reference);
  double *reference_out = reference.data_ptr<double>(), *sum_out = sum.data_ptr<double>();
  const RowKernels& kernels = best_kernels(logit_type(logits));
  at::parallel_for(0, rows.count, rows_per_task(columns), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const RowStatistics row = kernels.statistics(rows.row(r), columns);
      reference_out[r] = row.reference;
      sum_out[r] = row.sum;
    }
  });
  return {reference, sum};
}

struct GradientInputs {
  const int64_t* targets;
  const double* logprobs;
  const double* log_normaliser;
  const double* grad;
};

// At a target the gradient is (sum of grad of its entries) - coefficient * p, with p from the exact log-prob: a
// softmax in 16 bits near 1 would leave nothing of 1 - p.
template <typename scalar_t>
void write_targets(scalar_t* row, const int64_t* begin, const int64_t* end, const GradientInputs& inputs,
                   const Shard& shard, double coefficient) {
  for (const int64_t* entry = begin; entry < end; ++entry) {
    const int64_t token = inputs.targets[*entry];
    if (!shard.owns(token)) continue;
    const auto same = [&](int64_t other) { return inputs.targets[other] == token; };
    if (std::any_of(begin, entry, same)) continue;
    double total = 0;
    for (const int64_t* other = entry; other < end; ++other) total += same(*other) ? inputs.grad[*other] : 0.0;
    row[token - shard.vocab_start] =
        static_cast<scalar_t>(total - (coefficient == 0.0 ? 0.0 : coefficient * std::exp(inputs.logprobs[*entry])));
  }
}

void write_gradient(const Tensor& out, const Tensor& logits, const Tensor& logit_rows, const Tensor& targets_any,
                    const Tensor& logprobs_any, const Tensor& log_normaliser_any, const Tensor& grad_any, Shard shard) {
  check_gradient(logits, logit_rows, targets_any, logprobs_any, log_normaliser_any, grad_any, shard.columns);
  check_rows(logit_rows.contiguous(), logits.size(0));
  const Tensor targets = targets_any.contiguous(), logprobs = logprobs_any.contiguous();
  const Tensor log_normaliser = log_normaliser_any.contiguous(), grad = grad_any.contiguous();
  const Rows rows_out(out), rows_in(logits);
  const GradientInputs inputs{targets.const_data_ptr<int64_t>(), logprobs.const_data_ptr<double>(),
                              log_normaliser.const_data_ptr<double>(), grad.const_data_ptr<double>()};
  const auto [sorted, order] = at::sort(logit_rows, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int64_t *sorted_rows = sorted.const_data_ptr<int64_t>(), *entries = order.const_data_ptr<int64_t>();
  const auto first_entry = [&, count = targets.numel()](int64_t row) {
    return entries + (std::lower_bound(sorted_rows, sorted_rows + count, row) - sorted_rows);
  };
  const RowKernels& kernels = best_kernels(logit_type(logits));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "write_gradient", [&] {
    at::parallel_for(0, rows_in.count, rows_per_task(shard.columns), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const int64_t *begin = first_entry(r), *end = first_entry(r + 1);
        double coefficient = 0;
        for (const int64_t* entry = begin; entry < end; ++entry) coefficient += inputs.grad[*entry];
        if (coefficient != 0.0) {
          kernels.exponentials(rows_out.row(r), rows_in.row(r), shard.columns, inputs.log_normaliser[r], -coefficient);
        }
        rows_out.clear(r, coefficient != 0.0 ? shard.columns : 0);
        write_targets(reinterpret_cast<scalar_t*>(rows_out.row(r)), begin, end, inputs, shard, coefficient);
      }
    });
  });
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

TORCH_LIBRARY_IMPL(megatron_sip, CPU, library) {
  library.impl("row_statistics", &row_statistics);
  library.impl("gradient", &gradient);
  library.impl("gradient_", &gradient_);
}

}  // namespace megatron_sip
