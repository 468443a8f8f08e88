// The row kernels, written once over float vectors. Each row_*.cpp defines, in an anonymous namespace and after switching
// its instruction set on, `Register` and `kRegisters` and then includes this file; hence no include guard.
//
// Register: static kWidth; load(const T*), store(T*, Register) for Float, BFloat16, Half; broadcast(float);
// add, sub, mul, fma(a, b, c) = a * b + c, fms(a, b, c) = a * b - c; max(a, b) = b if either is NaN;
// exponent_from_low_bits(a) = the float whose bits are those of a shifted left by 23; to_lanes(float*).

// `kRegisters` registers that each step is applied to in turn. exp is one long chain of dependent steps: without several
// chains side by side in program order the processor's scheduler fills up with waiting ones.
struct Vector {
  static constexpr int64_t kWidth = kRegisters * Register::kWidth;
  Register part[kRegisters];

  template <typename Function>
  static inline Vector each(Function function) {
    Vector result;
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) result.part[i] = function(i);
    return result;
  }

  template <typename T>
  static inline Vector load(const T* p) {
    return each([=](int i) { return Register::load(p + i * Register::kWidth); });
  }
  template <typename T>
  static inline void store(T* p, const Vector& x) {
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; ++i) Register::store(p + i * Register::kWidth, x.part[i]);
  }
  inline void to_lanes(float* p) const {
    for (int i = 0; i < kRegisters; ++i) part[i].to_lanes(p + i * Register::kWidth);
  }
  static inline Vector broadcast(float x) {
    return each([=](int) { return Register::broadcast(x); });
  }
  static inline Vector add(const Vector& a, const Vector& b) {
    return each([&](int i) { return Register::add(a.part[i], b.part[i]); });
  }
  static inline Vector sub(const Vector& a, const Vector& b) {
    return each([&](int i) { return Register::sub(a.part[i], b.part[i]); });
  }
  static inline Vector mul(const Vector& a, const Vector& b) {
    return each([&](int i) { return Register::mul(a.part[i], b.part[i]); });
  }
  static inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
    return each([&](int i) { return Register::fma(a.part[i], b.part[i], c.part[i]); });
  }
  static inline Vector fms(const Vector& a, const Vector& b, const Vector& c) {
    return each([&](int i) { return Register::fms(a.part[i], b.part[i], c.part[i]); });
  }
  static inline Vector max(const Vector& a, const Vector& b) {
    return each([&](int i) { return Register::max(a.part[i], b.part[i]); });
  }
  static inline Vector exponent_from_low_bits(const Vector& a) {
    return each([&](int i) { return Register::exponent_from_low_bits(a.part[i]); });
  }
};

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
// The reference moves when a logit exceeds it by more than this: float32 then keeps x - reference exact to
// 2.4e-7, and e^8 times the block is far from overflow.
constexpr float kSlack = 8.0f;
// The power 2^n of exp is put together in the exponent's bits: at -88 the bits are 0, so that exp is 0 there and below.
constexpr float kLowestExponent = -88.0f;
// 1.5 * 2^23 + 127: the nearest whole number n of what is added to it stands in the low bits, biased as an exponent is.
constexpr float kRoundToBiased = 12583039.0f;

inline Vector lower_bounded(const Vector& x) { return Vector::max(Vector::broadcast(kLowestExponent), x); }

// exp(x) for x from kLowestExponent to some tens, or NaN.
inline Vector exponential(const Vector& x) {
  const Vector log2e = Vector::broadcast(1.44269504f);
  const Vector biased = Vector::fma(x, log2e, Vector::broadcast(kRoundToBiased));
  const Vector whole = Vector::sub(biased, Vector::broadcast(kRoundToBiased));
  const Vector fraction = Vector::fms(x, log2e, whole);
  // 2^fraction on [-0.5, 0.5]: minimax in the relative error with 2^0 = 1, 1.6e-7 at most in float32.
  Vector p = Vector::broadcast(1.326472731e-3f);
  p = Vector::fma(p, fraction, Vector::broadcast(9.671512991e-3f));
  p = Vector::fma(p, fraction, Vector::broadcast(5.550733581e-2f));
  p = Vector::fma(p, fraction, Vector::broadcast(2.402224243e-1f));
  p = Vector::fma(p, fraction, Vector::broadcast(6.931470037e-1f));
  p = Vector::fma(p, fraction, Vector::broadcast(1.0f));
  return Vector::mul(p, Vector::exponent_from_low_bits(biased));
}

template <typename T>
inline Vector load_partial(const T* row, int64_t count) {
  T padded[Vector::kWidth];
  for (int64_t i = 0; i < Vector::kWidth; ++i) padded[i] = T::negative_infinity();
  std::memcpy(static_cast<void*>(padded), row, count * sizeof(T));
  return Vector::load(padded);
}

template <typename T>
inline void store_partial(T* out, const Vector& values, int64_t count) {
  T padded[Vector::kWidth];
  Vector::store(padded, values);
  std::memcpy(static_cast<void*>(out), padded, count * sizeof(T));
}

// Both reduce by halves, which takes a few vector steps where a chain over the lanes would take hundreds of cycles.
inline double sum_of_lanes(const Vector& v) {
  float lanes[Vector::kWidth];
  double totals[Vector::kWidth];
  v.to_lanes(lanes);
  for (int64_t i = 0; i < Vector::kWidth; ++i) totals[i] = lanes[i];
#pragma GCC unroll 8
  for (int64_t half = Vector::kWidth / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) totals[i] += totals[i + half];
  }
  return totals[0];
}

inline float max_of_lanes(const Vector& v) {
  float lanes[Vector::kWidth];
  v.to_lanes(lanes);
#pragma GCC unroll 8
  for (int64_t half = Vector::kWidth / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

template <typename T>
inline float block_max(const T* row, int64_t count) {
  Vector highest = Vector::broadcast(kNegativeInfinity);
  int64_t i = 0;
  for (; i + Vector::kWidth <= count; i += Vector::kWidth) highest = Vector::max(Vector::load(row + i), highest);
  if (i < count) highest = Vector::max(load_partial(row + i, count - i), highest);
  return max_of_lanes(highest);
}

struct Accumulator {
  Vector sum = Vector::broadcast(0.0f);
  Vector weighted = Vector::broadcast(0.0f);

  inline Vector add(const Vector& x, const Vector& reference) {
    const Vector shifted = lower_bounded(Vector::sub(x, reference));
    const Vector weight = exponential(shifted);
    sum = Vector::add(sum, weight);
    weighted = Vector::fma(weight, shifted, weighted);
    return weight;
  }
};

// The running statistics of a row. Blocks are summed in float32 lanes, rows in float64.
struct OnlineRow {
  float reference = kNegativeInfinity;
  double sum = 0;
  double weighted = 0;

  // Makes a block whose maximum is `highest` safe to add; false if it adds nothing.
  inline bool admit(float highest) {
    if (highest == kNegativeInfinity) return false;
    if (reference == kNegativeInfinity) {
      reference = highest;
    } else if (highest > reference + kSlack) {
      const double shift = static_cast<double>(reference) - highest;
      const double factor = std::exp(shift);
      weighted = factor * (weighted + shift * sum);
      sum *= factor;
      reference = highest;
    }
    return true;
  }

  // `keep`, unless null, receives exp(x - reference).
  template <typename T>
  inline void add_block(const T* row, int64_t count, Float* keep) {
    const Vector shift = Vector::broadcast(reference);
    Accumulator total;
    int64_t i = 0;
    if (keep == nullptr) {
      for (; i + Vector::kWidth <= count; i += Vector::kWidth) total.add(Vector::load(row + i), shift);
      if (i < count) total.add(load_partial(row + i, count - i), shift);
    } else {
      for (; i + Vector::kWidth <= count; i += Vector::kWidth) {
        Vector::store(keep + i, total.add(Vector::load(row + i), shift));
      }
      if (i < count) store_partial(keep + i, total.add(load_partial(row + i, count - i), shift), count - i);
    }
    sum += sum_of_lanes(total.sum);
    weighted += sum_of_lanes(total.weighted);
  }

  RowStatistics statistics() const { return {reference, sum, weighted}; }
};

template <typename T>
RowStatistics statistics(const void* data, int64_t length) {
  const T* row = static_cast<const T*>(data);
  OnlineRow online;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = length - begin < kBlock ? length - begin : kBlock;
    if (online.admit(block_max(row + begin, count))) online.add_block<T>(row + begin, count, nullptr);
  }
  return online.statistics();
}

// out = function(row), prefetching the same places of `next`.
template <typename In, typename Out, typename Function>
inline void transform(Out* out, const In* row, int64_t length, const Out* next, Function function) {
  constexpr int64_t kLine = 64 / sizeof(Out);
  int64_t i = 0;
  for (; i + Vector::kWidth <= length; i += Vector::kWidth) {
    if (next != nullptr) {
      for (int64_t j = i; j < i + Vector::kWidth; j += kLine) __builtin_prefetch(next + j, 0, 2);
    }
    Vector::store(out + i, function(Vector::load(row + i)));
  }
  if (i < length) store_partial(out + i, function(load_partial(row + i, length - i)), length - i);
}

inline Float* exponentials_of(Float* row, const RowScratch&) { return row; }
template <typename T>
inline Float* exponentials_of(T*, const RowScratch& scratch) {
  return scratch.exponentials;
}

template <typename T>
RowStatistics softmax(void* data, int64_t length, double factor, const RowScratch& scratch, const void* next_row) {
  T* row = static_cast<T*>(data);
  const T* next = static_cast<const T*>(next_row);
  Float* kept = exponentials_of(row, scratch);
  OnlineRow online;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = length - begin < kBlock ? length - begin : kBlock;
    const bool counts = online.admit(block_max(row + begin, count));
    scratch.references[begin / kBlock] = counts ? online.reference : kNegativeInfinity;
    if (counts) online.add_block<T>(row + begin, count, kept + begin);
  }
  const double log_normaliser = online.reference + std::log(online.sum);
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = length - begin < kBlock ? length - begin : kBlock;
    const float reference = scratch.references[begin / kBlock];
    if (reference == kNegativeInfinity) {
      // Nothing but -inf (or NaN, which the row's sum then shows): read the logits themselves, which give 0 (or NaN).
      const Vector by = Vector::broadcast(std::isnan(online.sum) ? online.sum : 0.0f);
      transform(row + begin, row + begin, count, next == nullptr ? next : next + begin,
                [=](const Vector&) { return by; });
      continue;
    }
    const Vector by = Vector::broadcast(static_cast<float>(factor * std::exp(reference - log_normaliser)));
    transform(row + begin, kept + begin, count, next == nullptr ? next : next + begin,
              [=](const Vector& x) { return Vector::mul(x, by); });
  }
  return online.statistics();
}

template <typename T>
void exponentials(void* out, const void* row, int64_t length, double log_normaliser, double factor) {
  const float rounded = static_cast<float>(log_normaliser);
  const Vector shift = Vector::broadcast(rounded);
  const Vector by = Vector::broadcast(static_cast<float>(factor * std::exp(rounded - log_normaliser)));
  transform<T, T>(static_cast<T*>(out), static_cast<const T*>(row), length, nullptr, [=](const Vector& x) {
    return Vector::mul(by, exponential(lower_bounded(Vector::sub(x, shift))));
  });
}

template <typename T>
void scale(void* out, const void* row, int64_t length, double factor) {
  const Vector by = Vector::broadcast(static_cast<float>(factor));
  transform<T, T>(static_cast<T*>(out), static_cast<const T*>(row), length, nullptr,
                  [=](const Vector& x) { return Vector::mul(x, by); });
}

template <typename T>
constexpr RowKernels kernels_for() {
  return {statistics<T>, softmax<T>, exponentials<T>, scale<T>};
}

inline const RowKernels* float_lane_kernels(LogitType type) {
  static constexpr RowKernels kFloat32 = kernels_for<Float>();
  static constexpr RowKernels kBFloat16 = kernels_for<BFloat16>();
  static constexpr RowKernels kFloat16 = kernels_for<Half>();
  switch (type) {
    case LogitType::kFloat32:
      return &kFloat32;
    case LogitType::kBFloat16:
      return &kBFloat16;
    case LogitType::kFloat16:
      return &kFloat16;
    default:
      return nullptr;
  }
}
