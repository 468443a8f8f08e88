// The Python module: what was built, and the row kernels and products one instruction set at a time for their tests.
// The operators themselves are registered with torch by *_cpu.cpp and logprob_cuda_ops.cpp when the module is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/bf16_products.h"
#include "cpu/instruction_set.h"
#include "cpu/row_kernels.h"

#ifndef MEGATRON_SIP_CUDA_ARCHITECTURES
#define MEGATRON_SIP_CUDA_ARCHITECTURES ""
#endif

namespace megatron_sip {
namespace {

const RowKernels& kernels_named(const std::string& instruction_set, const std::string& dtype) {
  const std::vector<std::pair<std::string, LogitType>> types = {{"float32", LogitType::kFloat32},
                                                                {"bfloat16", LogitType::kBFloat16},
                                                                {"float16", LogitType::kFloat16},
                                                                {"float64", LogitType::kFloat64}};
  for (const auto& [name, type] : types) {
    if (name == dtype) return kernels_for_instruction_set(instruction_set, type);
  }
  throw std::invalid_argument("no row kernels for dtype '" + dtype + "'");
}

#if defined(__x86_64__)
std::vector<std::string> product_paths() {
  std::vector<std::string> result;
  if (avx512_bf16_usable()) result.push_back("dots");
  if (tile_products()) result.push_back("tiles");
  return result;
}

// Operands as (address, row or line, chunk), c as (address, row).
void multiply_by(const std::string& path, std::tuple<uintptr_t, int64_t, int64_t> a,
                 std::tuple<uintptr_t, int64_t, int64_t> b, std::tuple<uintptr_t, int64_t> c, int64_t rows,
                 int64_t columns, int64_t pairs, bool accumulate) {
  const std::vector<std::string> paths = product_paths();
  if (std::find(paths.begin(), paths.end(), path) == paths.end()) {
    throw std::invalid_argument("this processor has no bfloat16 products by '" + path + "'");
  }
  const LeftOperand left = {reinterpret_cast<const uint16_t*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a)};
  const RightOperand right = {reinterpret_cast<const uint32_t*>(std::get<0>(b)), std::get<1>(b), std::get<2>(b)};
  const TileScope tiles;
  multiply(left, right, reinterpret_cast<float*>(std::get<0>(c)), std::get<1>(c), rows, columns, pairs, accumulate,
           path == "tiles");
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def(
      "cuda_architectures", [] { return MEGATRON_SIP_CUDA_ARCHITECTURES; },
      "Compute capabilities of the CUDA kernels, as 'sm_80,sm_90'; empty where they were not built.");
  module.def("instruction_set", &best_instruction_set, "What the CPU operators run on this processor.");
#if defined(__x86_64__)
  module.def("product_paths", &product_paths, "What bfloat16 products may go by on this processor: 'dots', 'tiles'.");
  module.def("multiply", &multiply_by,
             "c (+)= a times b by one path, on the operands of bf16_products.h at addresses.");
#endif
  module.def(
      "row_statistics",
      [](const std::string& instruction_set, const std::string& dtype, uintptr_t row, int64_t length) {
        const RowStatistics result =
            kernels_named(instruction_set, dtype).statistics(reinterpret_cast<const void*>(row), length);
        return std::make_pair(result.reference, result.sum);
      },
      "(reference, sum) of one row at an address.");
  module.def(
      "row_exponentials",
      [](const std::string& instruction_set, const std::string& dtype, uintptr_t out, uintptr_t row, int64_t length,
         double log_normaliser, double factor) {
        kernels_named(instruction_set, dtype)
            .exponentials(reinterpret_cast<void*>(out), reinterpret_cast<const void*>(row), length, log_normaliser,
                          factor);
      },
      "Writes factor * exp(row - log_normaliser) at the address `out`.");
}

}  // namespace megatron_sip
