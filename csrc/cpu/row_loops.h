// The row kernels as plain loops, for the compiler to vectorise. row_kernels.cpp includes this file once for each
// instruction set, in a namespace of its own and with the set switched on; hence no include guard.

// 2^f for f in [-1/2, 1/2], highest coefficient first, minimax in the relative error: 1.6e-7 in float32, with 2^0 = 1;
// and 7.5e-5, a twentieth or less of what rounding to bfloat16 costs.
constexpr float kPower[] = {1.326465903e-3f, 9.671565806e-3f, 5.550734387e-2f, 2.402224127e-1f, 6.931469770e-1f, 1.0f};
constexpr float kRoughPower[] = {5.517133736e-2f, 2.426134875e-1f, 6.932612125e-1f, 9.999279328e-1f};

// e^x is 0 here and below. GCC would turn a bound that it knows into a branch, which no vector can take.
const volatile float kLowest = -88.1f;

// e^x times what the polynomial was multiplied by, for x from kLowest to 88; NaN stays NaN.
template <int kTerms>
inline float exponential(const float (&polynomial)[kTerms], float x) {
  constexpr float kLog2E = 1.44269504f;
  // A float32 of this size is a whole number, and this one ends in the bits of 127, the exponent of 1: with n added,
  // the last bits are the exponent of 2^n.
  constexpr float kExponent = 12582912.0f + 127.0f;
  const float shifted = x * kLog2E + kExponent;
  const float fraction = x * kLog2E - (shifted - kExponent);
  float power = polynomial[0];
#pragma GCC unroll 8
  for (int i = 1; i < kTerms; ++i) power = power * fraction + polynomial[i];
  return power * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);
}

// Of the logits that came by in each lane.
struct Lanes {
  float sum[kLanes];      // of exp(x - reference), if no logit lies more than 88 above the reference
  float highest[kLanes];  // NaNs do not count
};

template <typename T>
inline void add_to_lanes(const T* row, int64_t count, float reference, Lanes& lanes) {
  const float lowest = kLowest;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(row[i]), above = x - reference;
    lanes.sum[i] += exponential(kPower, above < lowest ? lowest : above);
    lanes.highest[i] = x > lanes.highest[i] ? x : lanes.highest[i];
  }
}

// The first lane holds the result of all.
template <typename T>
inline Lanes block_statistics(const T* row, int64_t count, float reference) {
  Lanes lanes;
  std::fill_n(lanes.sum, kLanes, 0.0f);
  std::fill_n(lanes.highest, kLanes, kNegativeInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    prefetch(row + i);
    add_to_lanes(row + i, kLanes, reference, lanes);
  }
  add_to_lanes(row + i, count - i, reference, lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes.sum[lane] += lanes.sum[half + lane];
      lanes.highest[lane] = std::max(lanes.highest[lane], lanes.highest[half + lane]);
    }
  }
  return lanes;
}

// Blocks are summed in float32, the row in float64. The reference moves to the maximum of a block that exceeds it by
// more than kSlack, hardly ever after the first one; such a block is summed again.
template <typename T>
RowStatistics statistics(const void* data, int64_t length) {
  const T* row = static_cast<const T*>(data);
  float reference = 0;
  double sum = 0;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = std::min(kBlock, length - begin);
    Lanes block = block_statistics(row + begin, count, reference);
    const float highest = block.highest[0];
    const bool first = sum == 0 && highest > kNegativeInfinity;
    if (first || highest > reference + kSlack) {
      sum = first ? 0 : sum * std::exp(static_cast<double>(reference) - highest);
      reference = highest;
      block = block_statistics(row + begin, count, reference);
    }
    sum += block.sum[0];
  }
  return {sum == 0 ? kNegativeInfinity : reference, sum};
}

template <typename T, int kTerms>
inline void write_exponentials(T* out, const T* row, int64_t count, const float (&polynomial)[kTerms], float shift) {
  const float lowest = kLowest;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x = static_cast<float>(row[i]) - shift;
    assign(out[i], exponential(polynomial, x < lowest ? lowest : x));
  }
}

template <typename T>
void exponentials(void* out_data, const void* data, int64_t length, double log_normaliser, double factor) {
  const T* row = static_cast<const T*>(data);
  T* out = static_cast<T*>(out_data);
  constexpr bool kRough = std::is_same_v<T, c10::BFloat16>;
  constexpr int kTerms = static_cast<int>(kRough ? std::size(kRoughPower) : std::size(kPower));
  const float shift = static_cast<float>(log_normaliser);
  const double by = factor * std::exp(shift - log_normaliser);
  float polynomial[kTerms];
  for (int i = 0; i < kTerms; ++i) polynomial[i] = static_cast<float>(by * (kRough ? kRoughPower : kPower)[i]);
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    prefetch(row + i);
    write_exponentials(out + i, row + i, kLanes, polynomial, shift);
  }
  write_exponentials(out + i, row + i, length - i, polynomial, shift);
}

inline const RowKernels& kernels(LogitType type) {
  static constexpr RowKernels kFloat32 = {statistics<float>, exponentials<float>};
  static constexpr RowKernels kBFloat16 = {statistics<c10::BFloat16>, exponentials<c10::BFloat16>};
  static constexpr RowKernels kFloat16 = {statistics<c10::Half>, exponentials<c10::Half>};
  switch (type) {
    case LogitType::kFloat32: return kFloat32;
    case LogitType::kBFloat16: return kBFloat16;
    case LogitType::kFloat16: return kFloat16;
    default: return kFloat64Kernels;
  }
}
