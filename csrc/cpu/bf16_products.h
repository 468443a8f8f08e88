// Products of bfloat16 matrices with float32 sums, by the processor's tile registers (AMX) where it has them and lets
// us use them, else by AVX-512's dot products.
//
// The right operand has its rows interleaved in pairs: element n of line p holds rows 2p and 2p + 1 of column n, the
// former in the lower half. Both kinds of instruction want it so.
#pragma once

#include <cstdint>

namespace megatron_sip {

// Whether products go through tile registers.
bool tile_products();

// Holds the calling thread's tile registers, if there are any: no product without it.
class TileScope {
 public:
  TileScope();
  ~TileScope();
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Rows of bfloat16 in chunks of 32: element k of row r lies at data + r * row + k / 32 * chunk + k % 32.
struct LeftOperand {
  const uint16_t* data;
  int64_t row;
  int64_t chunk = 32;
};

// Lines of interleaved pairs in chunks of 16 columns: column n of line p lies at data + p * line + n / 16 * chunk + n
// % 16.
struct RightOperand {
  const uint32_t* data;
  int64_t line;
  int64_t chunk = 16;
};

// c [rows, columns] (+)= a [rows, 2 * pairs] times b [2 * pairs, columns]; columns a multiple of 16, c's rows `ldc`
// apart. `by_tiles` only where there are any.
void multiply(LeftOperand a, RightOperand b, float* c, int64_t ldc, int64_t rows, int64_t columns, int64_t pairs,
              bool accumulate, bool by_tiles = tile_products());

}  // namespace megatron_sip
