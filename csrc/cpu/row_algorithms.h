// The row kernels, written once over float vectors. Each row_*.cpp defines, in an anonymous namespace and after
// switching its instruction set on, `Register` and `kRegisters` and then includes this file; hence no include guard.
//
// Register: static kWidth; broadcast(float); add, mul; fma(a, b, c) = a * b + c, rounded once; max(a, b) = b if either
// is NaN; to_lanes(float*); fraction(a) = a - floor(a), finite for -inf; times_power(a, b) = a * 2^floor(b), which
// becomes 0 and infinite (no NaN) where float32 ends. For Float, BFloat16 and Half: load(const T*, Register& a,
// Register& b) and store(T*, a, b) of 2 * kWidth logits; which of them lies in which lane is the type's own affair.

// `kRegisters` registers (an even number) that each step is applied to in turn. exp is one long chain of dependent
// steps: without several chains side by side in program order the processor's scheduler fills up with waiting ones.
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
    Vector result;
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; i += 2) {
      Register::load(p + i * Register::kWidth, result.part[i], result.part[i + 1]);
    }
    return result;
  }
  template <typename T>
  static inline void store(T* p, const Vector& x) {
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; i += 2) Register::store(p + i * Register::kWidth, x.part[i], x.part[i + 1]);
  }
  static inline Vector broadcast(float x) {
    return each([=](int) { return Register::broadcast(x); });
  }
  static inline Vector add(const Vector& a, const Vector& b) {
    return each([&](int i) { return Register::add(a.part[i], b.part[i]); });
  }
  static inline Vector mul(const Vector& a, Register b) {
    return each([&](int i) { return Register::mul(a.part[i], b); });
  }
  static inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
    return each([&](int i) { return Register::fma(a.part[i], b.part[i], c.part[i]); });
  }
  static inline Vector fma(const Vector& a, const Vector& b, Register c) {
    return each([&](int i) { return Register::fma(a.part[i], b.part[i], c); });
  }
  static inline Vector fma(const Vector& a, Register b, Register c) {
    return each([&](int i) { return Register::fma(a.part[i], b, c); });
  }
  static inline Vector max(const Vector& a, const Vector& b) {
    return each([&](int i) { return Register::max(a.part[i], b.part[i]); });
  }
  static inline Vector fraction(const Vector& a) {
    return each([&](int i) { return Register::fraction(a.part[i]); });
  }
  static inline Vector times_power(const Vector& a, const Vector& b) {
    return each([&](int i) { return Register::times_power(a.part[i], b.part[i]); });
  }
};

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f;
// Logits beyond this are equal or so far apart that exp is 0: any base will do, and with 1 their shift stays exact.
constexpr double kFar = 1e9;
// The reference moves when a block's sum reaches kMost and a logit exceeds the reference by more than kSlack: float32
// keeps the shifted logits exact to 5e-7 until then.
constexpr double kMost = 4096;
constexpr double kSlack = 8;
// 2^x is 0 here and below, and finite x keep its product with x from being NaN.
constexpr float kLowest = -200.0f;

// 2^f on [0, 1), minimax in the relative error: 1.7e-7 at most in float32, with 2^0 = 1.
constexpr float kPower[] = {1.0f, 6.931510568e-1f, 2.401658148e-1f, 5.580065399e-2f, 9.010603651e-3f, 1.871729386e-3f};
// The same to 7.5e-5: a twentieth or less of what rounding to bfloat16 costs.
constexpr float kRoughPower[] = {9.999251962e-1f, 6.958312392e-1f, 2.260741293e-1f, 7.801982760e-2f};

template <typename T>
constexpr const auto& power_for() {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return kRoughPower;
  } else {
    return kPower;
  }
}

// by * 2^x
template <int kTerms>
struct Power {
  Register coefficient[kTerms];

  explicit inline Power(const float (&polynomial)[kTerms], double by = 1.0) {
#pragma GCC unroll 8
    for (int i = 0; i < kTerms; ++i) coefficient[i] = Register::broadcast(static_cast<float>(by * polynomial[i]));
  }

  inline Vector operator()(const Vector& x) const {
    const Vector fraction = Vector::fraction(x);
    Vector p = Vector::fma(fraction, coefficient[kTerms - 1], coefficient[kTerms - 2]);
#pragma GCC unroll 8
    for (int i = kTerms - 3; i >= 0; --i) p = Vector::fma(p, fraction, coefficient[i]);
    return Vector::times_power(p, x);
  }
};

// How far logits lie above an origin, as an exponent of two: logit * scale - offset, rounded once. To take one
// instruction for any origin it moves that to offset / scale, by half a unit in the last place of float32 at most.
struct Shift {
  float scale = kLog2e;
  float offset = 0;

  Shift() = default;
  explicit inline Shift(double origin)
      : scale(std::abs(origin) < kFar ? kLog2e : 1.0f), offset(static_cast<float>(origin * scale)) {}

  inline double origin() const { return static_cast<double>(offset) / scale; }
  inline Vector operator()(const Vector& logits) const {
    return Vector::fma(logits, Register::broadcast(scale), Register::broadcast(-offset));
  }
};

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

// Reduces by halves, which takes a few vector steps where a chain over the lanes would take hundreds of cycles.
inline double sum_of_lanes(const Vector& v) {
  Register all = v.part[0];
  for (int i = 1; i < kRegisters; ++i) all = Register::add(all, v.part[i]);
  float lanes[Register::kWidth];
  double totals[Register::kWidth];
  all.to_lanes(lanes);
  for (int64_t i = 0; i < Register::kWidth; ++i) totals[i] = lanes[i];
#pragma GCC unroll 8
  for (int64_t half = Register::kWidth / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) totals[i] += totals[i + half];
  }
  return totals[0];
}

// NaNs do not count.
template <typename T>
inline float block_max(const T* row, int64_t count) {
  Vector highest = Vector::broadcast(kNegativeInfinity);
  int64_t i = 0;
  for (; i + Vector::kWidth <= count; i += Vector::kWidth) highest = Vector::max(Vector::load(row + i), highest);
  if (i < count) highest = Vector::max(load_partial(row + i, count - i), highest);
  float result = kNegativeInfinity;
  for (const Register& part : highest.part) {
    float lanes[Register::kWidth];
    part.to_lanes(lanes);
    for (const float lane : lanes) result = lane > result ? lane : result;
  }
  return result;
}

// What a pass over a row fetches from memory meanwhile: one `kPasses`-th of a row's length, from `from` on. As many
// passes a row, each for another part, read memory evenly.
template <typename T, int kPasses>
struct Ahead {
  const T* from;

  inline Ahead operator+(int64_t elements) const { return {from + elements / kPasses}; }
};

// Far enough for memory to answer, near enough to stay in the second-level cache. The rows of a matrix follow each
// other.
template <typename T>
inline Ahead<T, 1> next_of(const T* row) {
  return {row + 8192 / sizeof(T)};
}

// While a Vector is worked on: the row itself from the second-level cache into the first, and what is `ahead` from
// memory. Inlined by force: GCC deletes calls of a function that does nothing but prefetch.
template <typename T, int kPasses>
__attribute__((always_inline)) inline void prefetch(const T* row, Ahead<T, kPasses> ahead, int64_t i) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t kNear = 1024 / sizeof(T);
#pragma GCC unroll 8
  for (int64_t j = 0; j < Vector::kWidth; j += kLine) __builtin_prefetch(row + i + kNear + j, 0, 3);
#pragma GCC unroll 8
  for (int64_t j = 0; j < Vector::kWidth / kPasses; j += kLine) __builtin_prefetch((ahead + i).from + j, 0, 2);
}

// Sums over w = 2^x of shifted logits x.
struct Sums {
  double sum = 0;
  double weighted = 0;  // of w * x
};

inline Vector bounded(const Vector& shifted) { return Vector::max(Vector::broadcast(kLowest), shifted); }

// Without `kInfinite` a logit of -inf makes `weighted` NaN; with it each logit costs an instruction more.
template <bool kInfinite, typename T, typename Fetch>
inline Sums block_sums(const T* row, int64_t count, const Shift& shift, Fetch ahead) {
  const Power power(kPower);
  Vector sum = Vector::broadcast(0.0f), weighted = Vector::broadcast(0.0f);
  const auto add = [&](const Vector& shifted) {
    const Vector weight = power(shifted);
    sum = Vector::add(sum, weight);
    weighted = Vector::fma(weight, shifted, weighted);
  };
  int64_t i = 0;
  for (; i + Vector::kWidth <= count; i += Vector::kWidth) {
    prefetch(row, ahead, i);
    const Vector shifted = shift(Vector::load(row + i));
    add(kInfinite ? bounded(shifted) : shifted);
  }
  if (i < count) add(bounded(shift(load_partial(row + i, count - i))));
  return {sum_of_lanes(sum), sum_of_lanes(weighted)};
}

// The running statistics of a row. Blocks are summed in float32 lanes, rows in float64.
struct OnlineRow {
  Shift shift;
  Sums total;

  // Moves the reference to a block's maximum if that is too far above it, or nothing has counted yet.
  inline void admit(float highest) {
    if (highest == kNegativeInfinity || (total.sum != 0 && highest <= shift.origin() + kSlack)) return;
    const Shift next(highest);
    if (total.sum != 0) {
      const double by = (shift.origin() - next.origin()) * next.scale, factor = std::exp2(by);
      total = {factor * total.sum, factor * (total.weighted * next.scale / shift.scale + by * total.sum)};
    }
    shift = next;
  }

  template <typename T, typename Fetch>
  inline void add(const T* row, int64_t count, Fetch ahead) {
    Sums block;
    if (total.sum != 0) block = block_sums<false>(row, count, shift, ahead);
    if (total.sum == 0 || !(block.sum < kMost) || std::isnan(block.weighted)) {
      admit(block_max(row, count));
      block = block_sums<true>(row, count, shift, ahead);
    }
    total.sum += block.sum;
    total.weighted += block.weighted;
  }

  RowStatistics statistics() const {
    if (total.sum == 0) return {kNegativeInfinity, 0, 0};
    return {shift.origin(), total.sum, total.weighted / shift.scale};
  }
};

template <typename T, typename Fetch>
inline RowStatistics statistics_ahead(const T* row, int64_t length, Fetch ahead) {
  OnlineRow online;
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = length - begin < kBlock ? length - begin : kBlock;
    online.add(row + begin, count, ahead + begin);
  }
  return online.statistics();
}

// out = function(row)
template <typename T, typename Fetch, typename Function>
inline void transform(T* out, const T* row, int64_t length, Fetch ahead, Function function) {
  int64_t i = 0;
  for (; i + Vector::kWidth <= length; i += Vector::kWidth) {
    prefetch(row, ahead, i);
    Vector::store(out + i, function(Vector::load(row + i)));
  }
  if (i < length) store_partial(out + i, function(load_partial(row + i, length - i)), length - i);
}

template <typename T, typename Fetch>
inline void exponentials_ahead(T* out, const T* row, int64_t length, double log_normaliser, double factor,
                               Fetch ahead) {
  const Shift shift(log_normaliser);
  const Power power(power_for<T>(), factor * std::exp(shift.origin() - log_normaliser));
  transform(out, row, length, ahead, [=](const Vector& logits) { return power(shift(logits)); });
}

template <typename T>
RowStatistics statistics(const void* data, int64_t length) {
  const T* row = static_cast<const T*>(data);
  return statistics_ahead(row, length, next_of(row));
}

// The exponentials are computed twice: keeping them costs more, in cache traffic, than the second time does. The first
// pass fetches the second half of this row, the second pass the first half of the next.
template <typename T>
RowStatistics softmax(void* data, int64_t length, double factor) {
  T* row = static_cast<T*>(data);
  const Ahead<T, 2> rest = {row + length / 2}, next = {row + length};
  const RowStatistics result = statistics_ahead(row, length, rest);
  if (result.sum == 0) {
    std::memset(data, 0, length * sizeof(T));
  } else {
    exponentials_ahead(row, row, length, result.reference + std::log(result.sum), factor, next);
  }
  return result;
}

template <typename T>
void exponentials(void* out, const void* data, int64_t length, double log_normaliser, double factor) {
  const T* row = static_cast<const T*>(data);
  exponentials_ahead(static_cast<T*>(out), row, length, log_normaliser, factor, next_of(row));
}

template <typename T>
void scale(void* out, const void* data, int64_t length, double factor) {
  const T* row = static_cast<const T*>(data);
  const Register by = Register::broadcast(static_cast<float>(factor));
  transform(static_cast<T*>(out), row, length, next_of(row), [=](const Vector& x) { return Vector::mul(x, by); });
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
    case LogitType::kFloat32: return &kFloat32;
    case LogitType::kBFloat16: return &kBFloat16;
    case LogitType::kFloat16: return &kFloat16;
    default: return nullptr;
  }
}
