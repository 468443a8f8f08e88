// The launchers of csrc/cuda/logprob_cuda.cu for Python's ctypes. LOGPROB_CUDA_SOURCE is that file with its <<<>>>
// replaced.
#include "cuda_runtime_api.h"

#include LOGPROB_CUDA_SOURCE

using megatron_sip::DeviceEntries;
using megatron_sip::DeviceRows;
using megatron_sip::LogitType;

extern "C" {

void set_thread_order(int order) { emulated::order = order; }

int statistics(int type, const void* in, int64_t rows, int64_t width, int64_t columns, double* reference, double* sum) {
  const DeviceRows matrix{static_cast<LogitType>(type), in, rows, width, columns};
  return megatron_sip::launch_statistics(matrix, reference, sum, nullptr);
}

int gradient(int type, const void* in, int64_t rows, int64_t width, int64_t columns, const int64_t* begin,
             const int64_t* order, const int64_t* targets, const double* logprobs, const double* grad,
             int64_t vocab_start, const double* log_normaliser, void* out) {
  const DeviceRows matrix{static_cast<LogitType>(type), in, rows, width, columns};
  const DeviceEntries entries{begin, order, targets, logprobs, grad, vocab_start};
  return megatron_sip::launch_gradient(matrix, entries, log_normaliser, out, nullptr);
}
}
