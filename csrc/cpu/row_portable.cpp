// Row kernels in plain C++ for any processor, and the float64 ones that gradients are checked with.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

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

  static inline float value(Float x) { return x.value; }
  static inline float value(BFloat16 x) { return c10::detail::f32_from_bits(x.bits); }
  static inline float value(Half x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
  static inline void assign(Float& p, float x) { p.value = x; }
  static inline void assign(BFloat16& p, float x) { p.bits = c10::detail::round_to_nearest_even(x); }
  static inline void assign(Half& p, float x) { p.bits = c10::detail::fp16_ieee_from_fp32_value(x); }

  template <typename T>
  static inline void load(const T* p, Register& a, Register& b) {
    a = each([=](int64_t i) { return value(p[i]); });
    b = each([=](int64_t i) { return value(p[kWidth + i]); });
  }
  template <typename T>
  static inline void store(T* p, Register a, Register b) {
    for (int64_t i = 0; i < kWidth; ++i) assign(p[i], a.lane[i]);
    for (int64_t i = 0; i < kWidth; ++i) assign(p[kWidth + i], b.lane[i]);
  }
  inline void to_lanes(float* p) const { std::memcpy(p, lane, sizeof(lane)); }

  static inline Register broadcast(float x) {
    return each([=](int64_t) { return x; });
  }
  static inline Register add(Register a, Register b) {
    return each([&](int64_t i) { return a.lane[i] + b.lane[i]; });
  }
  static inline Register mul(Register a, Register b) {
    return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
  }
  static inline Register fma(Register a, Register b, Register c) {
    return each([&](int64_t i) {
#ifdef FP_FAST_FMAF
      return std::fma(a.lane[i], b.lane[i], c.lane[i]);
#else
      return static_cast<float>(static_cast<double>(a.lane[i]) * b.lane[i] + c.lane[i]);
#endif
    });
  }
  static inline Register max(Register a, Register b) {
    return each([&](int64_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  // The exponents of 0 and of infinity, between which 2^floor(x) is put together in the exponent's bits; NaN stays.
  static inline float bounded(float x) { return x < -127.0f ? -127.0f : (x > 128.0f ? 128.0f : x); }
  // By rounding to nearest: std::floor would be a call for each lane.
  static inline float floor(float x) {
    const float nearest = (x + 12582912.0f) - 12582912.0f;
    return nearest > x ? nearest - 1.0f : nearest;
  }
  static inline Register fraction(Register a) {
    return each([&](int64_t i) { return bounded(a.lane[i]) - floor(bounded(a.lane[i])); });
  }
  static inline Register times_power(Register a, Register b) {
    return each([&](int64_t i) {
      // 2^23 + 127: the sum's low bits are the exponent's.
      const float biased = floor(bounded(b.lane[i])) + 8388735.0f;
      uint32_t bits;
      std::memcpy(&bits, &biased, sizeof(bits));
      bits <<= 23;
      float power;
      std::memcpy(&power, &bits, sizeof(power));
      return a.lane[i] * power;
    });
  }
};

constexpr int kRegisters = 2;

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

RowStatistics softmax_float64(void* row, int64_t length, double factor) {
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
