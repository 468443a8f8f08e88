// Which instruction sets the kernels may use here, and macros that switch one on for the functions between them.
// Standard headers must come before those, so that none of their inline functions is compiled for it and then picked by
// the linker for everybody.
#pragma once

// What this processor has and torch uses: ATEN_CPU_CAPABILITY=avx2 or default bounds torch's kernels and ours alike.
namespace megatron_sip {

bool avx2_usable();         // with FMA and F16C
bool avx512_usable();       // F, BW, DQ, VL
bool avx512_bf16_usable();  // AVX-512 with bfloat16 dot products

}  // namespace megatron_sip

#define MEGATRON_SIP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MEGATRON_SIP_TARGET_BEGIN(features) \
  MEGATRON_SIP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MEGATRON_SIP_TARGET_END MEGATRON_SIP_PRAGMA(clang attribute pop)
#else
// GCC 12 and 13 take the intrinsics' own "undefined" operands for uninitialised variables (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#define MEGATRON_SIP_TARGET_BEGIN(features) \
  MEGATRON_SIP_PRAGMA(GCC push_options)     \
  MEGATRON_SIP_PRAGMA(GCC target(features))
#define MEGATRON_SIP_TARGET_END MEGATRON_SIP_PRAGMA(GCC pop_options)
#endif
