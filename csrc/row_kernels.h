// One row of logits at a time: the arithmetic under the CPU log-prob op, in one version an instruction set.
#pragma once

#include <cstdint>

namespace megatron_sip {

enum class LogitType { kFloat32, kBFloat16, kFloat16, kFloat64 };

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

// `reference` is at most 8.4 below the row's maximum (-inf without a logit above -inf).
struct RowStatistics {
  double reference;
  double sum;       // sum of w = exp(x - reference)
  double weighted;  // sum of w * (x - reference), from which the entropy follows
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

}  // namespace megatron_sip
