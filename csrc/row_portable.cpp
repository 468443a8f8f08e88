// Row kernels in plain C++ for any processor, and the float64 ones that gradients are checked with.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "row_kernels.h"

namespace megatron_sip {
namespace {

// Small fixed loops, which compilers turn into whatever vectors the platform guarantees.
struct Register {
  static constexpr int64_t kWidth = 8;
  float lane[kWidth];

  template <typename Function>
  static inline Register each(Function function) {
    Register result;
    for (int64_t i = 0; i < kWidth; ++i) result.lane[i] = function(i);
    return result;
  }

  static inline Register load(const Float* p) {
    return each([=](int64_t i) { return p[i].value; });
  }
  static inline Register load(const BFloat16* p) {
    return each([=](int64_t i) { return c10::detail::f32_from_bits(p[i].bits); });
  }
  static inline Register load(const Half* p) {
    return each([=](int64_t i) { return c10::detail::fp16_ieee_to_fp32_value(p[i].bits); });
  }
  static inline void store(Float* p, Register x) {
    for (int64_t i = 0; i < kWidth; ++i) p[i].value = x.lane[i];
  }
  static inline void store(BFloat16* p, Register x) {
    for (int64_t i = 0; i < kWidth; ++i) p[i].bits = c10::detail::round_to_nearest_even(x.lane[i]);
  }
  static inline void store(Half* p, Register x) {
    for (int64_t i = 0; i < kWidth; ++i) p[i].bits = c10::detail::fp16_ieee_from_fp32_value(x.lane[i]);
  }
  inline void to_lanes(float* p) const { std::memcpy(p, lane, sizeof(lane)); }

  static inline Register broadcast(float x) {
    return each([=](int64_t) { return x; });
  }
  static inline Register add(Register a, Register b) {
    return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  static inline Register sub(Register a, Register b) {
    return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
  }
  static inline Register mul(Register a, Register b) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  static inline Register fma(Register a, Register b, Register c) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static inline Register fms(Register a, Register b, Register c) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i] - c.lane[i]; });
  }
  static inline Register max(Register a, Register b) {
    return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static inline Register exponent_from_low_bits(Register a) {
    return each([&](int64_t i) {
      uint32_t bits;
      std::memcpy(&bits, &a.lane[i], sizeof(bits));
      bits <<= 23;
      float power;
      std::memcpy(&power, &bits, sizeof(power));
      return power;
    });
  }
};

constexpr int kRegisters = 1;

#include "row_algorithms.h"

RowStatistics statistics_float64(const void* data, int64_t length) {
  const double* row = static_cast<const double*>(data);
  double reference = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < length; ++i) reference = row[i] > reference ? row[i] : reference;
  double sum = 0, weighted = 0;
  if (reference == -std::numeric_limits<double>::infinity()) return {reference, sum, weighted};
  for (int64_t i = 0; i < length; ++i) {
    const double shifted = row[i] - reference;
    const double weight = std::exp(shifted);
    sum += weight;
    weighted += weight == 0.0 ? 0.0 : weight * shifted;
  }
  return {reference, sum, weighted};
}

void exponentials_float64(void* out, const void* row, int64_t length, double log_normaliser, double factor) {
  for (int64_t i = 0; i < length; ++i) {
    static_cast<double*>(out)[i] = factor * std::exp(static_cast<const double*>(row)[i] - log_normaliser);
  }
}

RowStatistics softmax_float64(void* row, int64_t length, double factor, const RowScratch&, const void*) {
  const RowStatistics result = statistics_float64(row, length);
  exponentials_float64(row, row, length, result.reference + std::log(result.sum), factor);
  return result;
}

void scale_float64(void* out, const void* row, int64_t length, double factor) {
  for (int64_t i = 0; i < length; ++i) static_cast<double*>(out)[i] = factor * static_cast<const double*>(row)[i];
}

}  // namespace

const RowKernels* portable_kernels(LogitType type) {
  static constexpr RowKernels kFloat64 = {statistics_float64, softmax_float64, exponentials_float64, scale_float64};
  return type == LogitType::kFloat64 ? &kFloat64 : float_lane_kernels(type);
}

}  // namespace megatron_sip
