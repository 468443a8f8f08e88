#include "instruction_set.h"

#include <ATen/Version.h>

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

}  // namespace megatron_sip
