// One row of logits at a time: the arithmetic under the CPU log-prob op, in one version an instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "logits.h"

namespace megatron_sip {

// Logits as they lie in memory; only the kernels' vector loads and stores give the 16-bit ones a value.
struct Float {
  float value;
  static constexpr Float negative_infinity() { return {-__builtin_inff()}; }
};
struct BFloat16 {
  uint16_t bits;
  static constexpr BFloat16 negative_infinity() { return {0xFF80}; }
};
struct Half {
  uint16_t bits;
  static constexpr Half negative_infinity() { return {0xFC00}; }
};

// Rows are gone through in blocks of this many logits, which stay in the first-level cache for the few read again.
constexpr int64_t kBlock = 2048;

// `out` may equal `row`. Meanwhile the memory behind a row is prefetched, where the next one is expected.
struct RowKernels {
  RowStatistics (*statistics)(const void* row, int64_t length);
  // Overwrites the row with factor * softmax.
  RowStatistics (*softmax)(void* row, int64_t length, double factor);
  // out = factor * exp(row - log_normaliser)
  void (*exponentials)(void* out, const void* row, int64_t length, double log_normaliser, double factor);
  // out = factor * row
  void (*scale)(void* out, const void* row, int64_t length, double factor);
};

// Each returns null where the compiler or the logit type does not support it (float64 is portable only).
const RowKernels* avx512_kernels(LogitType type);
const RowKernels* avx2_kernels(LogitType type);
const RowKernels* portable_kernels(LogitType type);

// "avx512", "avx2" or "portable".
std::string best_instruction_set();

// The version for a named instruction set, or the next plainer one that serves `type`; std::invalid_argument when it
// cannot be used here.
const RowKernels& kernels_for_instruction_set(const std::string& name, LogitType type);

const RowKernels& best_kernels(LogitType type);

}  // namespace megatron_sip
