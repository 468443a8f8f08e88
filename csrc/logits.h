// Logits and what is known of a row of them, for host and device code alike.
#pragma once

namespace megatron_sip {

enum class LogitType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// `reference` is at most 8 below the row's maximum (-inf without a logit above -inf).
struct RowStatistics {
  double reference;
  double sum;  // of exp(x - reference)
};

}  // namespace megatron_sip
