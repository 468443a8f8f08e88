// Launchers of the CUDA kernels. No torch headers here, so that nvcc compiles logprob_cuda.cu in seconds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "logits.h"

namespace megatron_sip {

// A contiguous [rows, width] matrix of logits of which the first `columns` count.
struct DeviceRows {
  LogitType type;
  const void* in;
  int64_t rows;
  int64_t width;
  int64_t columns;
};

// Entries sorted by row: those of row r are order[begin[r]] to order[begin[r + 1]].
struct DeviceEntries {
  const int64_t* begin;
  const int64_t* order;
  const int64_t* targets;
  const double* logprobs;
  const double* grad;
  int64_t vocab_start;
};

// RowStatistics of each row, as reference [rows] and sum [rows].
cudaError_t launch_statistics(const DeviceRows& rows, double* reference, double* sum, cudaStream_t stream);

// The gradient of the sum of grad * logprobs, [rows, width] like the logits; `out` may be the logits themselves.
cudaError_t launch_gradient(const DeviceRows& rows, const DeviceEntries& entries, const double* log_normaliser,
                            void* out, cudaStream_t stream);

}  // namespace megatron_sip
