// Which version of the row kernels this processor runs.
#pragma once

#include <string>

#include "row_kernels.h"

namespace megatron_sip {

// "avx512", "avx2" or "portable".
std::string best_instruction_set();

// The version for a named instruction set, or the next plainer one that serves `type`; std::invalid_argument when this
// processor lacks it.
const RowKernels& kernels_for_instruction_set(const std::string& name, LogitType type);

const RowKernels& best_kernels(LogitType type);

}  // namespace megatron_sip
