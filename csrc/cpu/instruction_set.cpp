#include "instruction_set.h"

#include <ATen/Version.h>

#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace megatron_sip {

#if defined(__x86_64__)

// Every processor with AVX2 and FMA has F16C too, which older compilers cannot be asked about.
bool avx2_usable() {
  return at::get_cpu_capability().starts_with("AVX") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool avx512_usable() {
  return at::get_cpu_capability().starts_with("AVX512") && avx2_usable() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool avx512_bf16_usable() { return avx512_usable() && __builtin_cpu_supports("avx512bf16"); }

#else

bool avx2_usable() { return false; }
bool avx512_usable() { return false; }
bool avx512_bf16_usable() { return false; }

#endif

std::string best_instruction_set() { return avx512_usable() ? "avx512" : avx2_usable() ? "avx2" : "portable"; }

const RowKernels& kernels_for_instruction_set(const std::string& name, LogitType type) {
  const RowKernels* kernels = nullptr;
  if (name == "avx512" && avx512_usable()) {
    kernels = avx512_kernels(type);
  } else if (name == "avx2" && avx2_usable()) {
    kernels = avx2_kernels(type);
  } else if (name != "portable") {
    throw std::invalid_argument("this processor has no instruction set '" + name + "'; it runs " +
                                best_instruction_set());
  }
  return kernels == nullptr ? *portable_kernels(type) : *kernels;
}

const RowKernels& best_kernels(LogitType type) { return kernels_for_instruction_set(best_instruction_set(), type); }

}  // namespace megatron_sip
