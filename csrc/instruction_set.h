// Switches an instruction set on for the functions that follow, up to the end of the file. Standard headers must come
// before, so that none of their inline functions is compiled for it and then picked by the linker for everybody.
#pragma once

#define MEGATRON_SIP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MEGATRON_SIP_TARGET_BEGIN(features) \
  MEGATRON_SIP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MEGATRON_SIP_TARGET_END MEGATRON_SIP_PRAGMA(clang attribute pop)
#else
#define MEGATRON_SIP_TARGET_BEGIN(features) \
  MEGATRON_SIP_PRAGMA(GCC push_options) MEGATRON_SIP_PRAGMA(GCC target(features))
#define MEGATRON_SIP_TARGET_END MEGATRON_SIP_PRAGMA(GCC pop_options)
#endif
