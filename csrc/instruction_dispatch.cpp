#include "instruction_dispatch.h"

#include <stdexcept>

namespace megatron_sip {
namespace {

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

// Every processor with AVX2 and FMA has F16C too, which older compilers cannot be asked about.
bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

}  // namespace

std::string best_instruction_set() { return has_avx512() ? "avx512" : has_avx2() ? "avx2" : "portable"; }

const RowKernels& kernels_for_instruction_set(const std::string& name, LogitType type) {
  const RowKernels* kernels = nullptr;
  if (name == "avx512" && has_avx512()) {
    kernels = avx512_kernels(type);
  } else if (name == "avx2" && has_avx2()) {
    kernels = avx2_kernels(type);
  } else if (name != "portable") {
    throw std::invalid_argument("this processor has no instruction set '" + name + "'; it runs " +
                                best_instruction_set());
  }
  return kernels == nullptr ? *portable_kernels(type) : *kernels;
}

const RowKernels& best_kernels(LogitType type) { return kernels_for_instruction_set(best_instruction_set(), type); }

}  // namespace megatron_sip
