// The row kernels of each instruction set, the float64 ones that gradients are checked with, and the choice among them.
#include "row_kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "instruction_set.h"

namespace megatron_sip {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
// Logits in a block: they stay in the first-level cache for the few that are read again.
constexpr int64_t kBlock = 2048;
// Logits that are worked on side by side: several vectors, for their chains of dependent steps.
constexpr int64_t kLanes = 64;
// Up to here above the reference, float32 keeps a shifted logit exact to 5e-7 and a block's sum far from its end.
constexpr float kSlack = 8;

RowStatistics float64_statistics(const void* data, int64_t length) {
  const double* row = static_cast<const double*>(data);
  double reference = kNegativeInfinity, sum = 0;
  for (int64_t i = 0; i < length; ++i) reference = row[i] > reference ? row[i] : reference;
  const double finite = reference == kNegativeInfinity ? 0 : reference;
  for (int64_t i = 0; i < length; ++i) sum += std::exp(row[i] - finite);
  return {reference, sum};
}

void float64_exponentials(void* out, const void* row, int64_t length, double log_normaliser, double factor) {
  for (int64_t i = 0; i < length; ++i) {
    static_cast<double*>(out)[i] = factor * std::exp(static_cast<const double*>(row)[i] - log_normaliser);
  }
}

constexpr RowKernels kFloat64Kernels = {float64_statistics, float64_exponentials};

// While these lanes are worked on: later ones from the second-level cache into the first, and from memory into the
// second. The rows of a matrix follow each other. Inlined by force: GCC deletes calls of a function that does nothing
// but prefetch.
template <typename T>
__attribute__((always_inline)) inline void prefetch(const T* lanes) {
  constexpr int64_t kNear = 1024, kFar = 8192, kLine = 64;
#pragma GCC unroll 4
  for (int64_t i = 0; i < kLanes * static_cast<int64_t>(sizeof(T)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(lanes) + kNear + i, 0, 3);
    __builtin_prefetch(reinterpret_cast<const char*>(lanes) + kFar + i, 0, 2);
  }
}

inline void assign(float& to, float x) { to = x; }
// Half a unit in the last place is added and the upper half kept: to nearest, ties away from zero. NaNs stay NaNs.
inline void assign(c10::BFloat16& to, float x) {
  to.x = static_cast<uint16_t>((std::bit_cast<uint32_t>(x) + 0x8000) >> 16);
}
inline void assign(c10::Half& to, float x) { to.x = c10::detail::fp16_ieee_from_fp32_value(x); }

namespace portable {
#include "row_loops.h"
}

#if defined(__x86_64__)
MEGATRON_SIP_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "row_loops.h"
}
MEGATRON_SIP_TARGET_END
MEGATRON_SIP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include "row_loops.h"
}
MEGATRON_SIP_TARGET_END
#endif

}  // namespace

std::string best_instruction_set() { return avx512_usable() ? "avx512" : avx2_usable() ? "avx2" : "portable"; }

const RowKernels& kernels_for_instruction_set(const std::string& name, LogitType type) {
#if defined(__x86_64__)
  if (name == "avx512" && avx512_usable()) return avx512::kernels(type);
  if (name == "avx2" && avx2_usable()) return avx2::kernels(type);
#endif
  if (name == "portable") return portable::kernels(type);
  throw std::invalid_argument("no instruction set '" + name + "' can be used here; the best is " +
                              best_instruction_set());
}

const RowKernels& best_kernels(LogitType type) { return kernels_for_instruction_set(best_instruction_set(), type); }

}  // namespace megatron_sip
