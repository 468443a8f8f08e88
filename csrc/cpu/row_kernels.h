// One row of logits at a time: the arithmetic under the CPU log-prob op, in one version an instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "logits.h"

namespace megatron_sip {

// Meanwhile the memory behind a row is prefetched, where the next one is expected.
struct RowKernels {
  RowStatistics (*statistics)(const void* row, int64_t length);
  // out = factor * exp(row - log_normaliser); `out` may equal `row`.
  void (*exponentials)(void* out, const void* row, int64_t length, double log_normaliser, double factor);
};

// "avx512", "avx2" or "portable".
std::string best_instruction_set();

// The version for a named instruction set (float64 has a portable one only); std::invalid_argument when it cannot be
// used here.
const RowKernels& kernels_for_instruction_set(const std::string& name, LogitType type);

const RowKernels& best_kernels(LogitType type);

}  // namespace megatron_sip
