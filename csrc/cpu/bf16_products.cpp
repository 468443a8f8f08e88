#include "bf16_products.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "instruction_set.h"

namespace megatron_sip {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 16;  // rows of a tile, each of 64 bytes: 16 floats or pairs

// Linux hands the tiles' state out on demand (arch_prctl ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA).
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16Tiles = 1u << 22, kTileState = 1u << 24;
  if ((d & kBf16Tiles) == 0 || (d & kTileState) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool tile_products() {
  static const bool usable = avx512_bf16_usable() && may_use_tiles();
  return usable;
}

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")

namespace megatron_sip {
namespace {

template <int ROWS, int VECTORS>
void dot_tile(LeftOperand a, RightOperand b, float* c, int64_t ldc, int64_t pairs, bool accumulate) {
  __m512 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] = accumulate ? _mm512_loadu_ps(c + r * ldc + v * kLanes) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i columns[VECTORS];
    for (int v = 0; v < VECTORS; ++v) columns[v] = _mm512_loadu_si512(b.data + p * b.line + v * b.chunk);
    const uint16_t* elements = a.data + p / kTile * a.chunk + p % kTile * 2;
    for (int r = 0; r < ROWS; ++r) {
      int32_t pair;
      std::memcpy(&pair, elements + r * a.row, sizeof(pair));
      const __m512i row = _mm512_set1_epi32(pair);
      for (int v = 0; v < VECTORS; ++v) {
        sums[r][v] =
            _mm512_dpbf16_ps(sums[r][v], reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(columns[v]));
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + r * ldc + v * kLanes, sums[r][v]);
}

LeftOperand from_row(LeftOperand a, int64_t r) { return {a.data + r * a.row, a.row, a.chunk}; }
RightOperand from_column(RightOperand b, int64_t n) { return {b.data + n / kLanes * b.chunk, b.line, b.chunk}; }

// Six rows of four vectors leave room for a line of b and an element of a in the 32 registers.
template <int VECTORS>
void multiply_columns(LeftOperand a, RightOperand b, float* c, int64_t ldc, int64_t rows, int64_t pairs,
                      bool accumulate) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) dot_tile<6, VECTORS>(from_row(a, r), b, c + r * ldc, ldc, pairs, accumulate);
  for (; r < rows; ++r) dot_tile<1, VECTORS>(from_row(a, r), b, c + r * ldc, ldc, pairs, accumulate);
}

void multiply_by_dots(LeftOperand a, RightOperand b, float* c, int64_t ldc, int64_t rows, int64_t columns,
                      int64_t pairs, bool accumulate) {
  constexpr int64_t kVectors = 4;
  for (int64_t n = 0; n < columns; n += kVectors * kLanes) {
    const RightOperand right = from_column(b, n);
    switch (std::min((columns - n) / kLanes, kVectors)) {
      case 4: multiply_columns<4>(a, right, c + n, ldc, rows, pairs, accumulate); break;
      case 3: multiply_columns<3>(a, right, c + n, ldc, rows, pairs, accumulate); break;
      case 2: multiply_columns<2>(a, right, c + n, ldc, rows, pairs, accumulate); break;
      default: multiply_columns<1>(a, right, c + n, ldc, rows, pairs, accumulate);
    }
  }
}

// One or two tiles of c's rows and columns: c's tiles are 0 to 3, a's 4 and 5, b's 6 and 7.
template <bool TWO_ROWS, bool TWO_COLUMNS>
void multiply_tiles(LeftOperand a, RightOperand b, float* c, int64_t ldc, int64_t pairs, bool accumulate) {
  const int64_t a_stride = a.row * 2, b_stride = b.line * 4, c_stride = ldc * 4;
  float *c_below = c + kTile * ldc, *c_right = c + kTile, *c_across = c_below + kTile;
  if (accumulate) {
    _tile_loadd(0, c, c_stride);
    if constexpr (TWO_COLUMNS) _tile_loadd(1, c_right, c_stride);
    if constexpr (TWO_ROWS) _tile_loadd(2, c_below, c_stride);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, c_across, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (TWO_COLUMNS) _tile_zero(1);
    if constexpr (TWO_ROWS) _tile_zero(2);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
  }
  for (int64_t p = 0; p < pairs; p += kTile, a.data += a.chunk, b.data += kTile * b.line) {
    _tile_loadd(4, a.data, a_stride);
    _tile_loadd(6, b.data, b_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TWO_COLUMNS) {
      _tile_loadd(7, b.data + b.chunk, b_stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TWO_ROWS) {
      _tile_loadd(5, a.data + kTile * a.row, a_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_stride);
  if constexpr (TWO_COLUMNS) _tile_stored(1, c_right, c_stride);
  if constexpr (TWO_ROWS) _tile_stored(2, c_below, c_stride);
  if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, c_across, c_stride);
}

// rows a multiple of 16, or fewer and the tiles so configured; columns and pairs multiples of 16. Row by row: a's stay
// in cache, and few pages of c are written at a time.
void multiply_by_tiles(LeftOperand a, RightOperand b, float* c, int64_t ldc, int64_t rows, int64_t columns,
                       int64_t pairs, bool accumulate) {
  for (int64_t r = 0; r < rows; r += 2 * kTile) {
    const bool two_rows = rows - r > kTile;
    for (int64_t n = 0; n < columns; n += 2 * kTile) {
      const bool two_columns = columns - n > kTile;
      const auto tiles = two_rows ? (two_columns ? multiply_tiles<true, true> : multiply_tiles<true, false>)
                                  : (two_columns ? multiply_tiles<false, true> : multiply_tiles<false, false>);
      tiles(from_row(a, r), from_column(b, n), c + r * ldc + n, ldc, pairs, accumulate);
    }
  }
}

// What LDTILECFG reads: palette 1, eight tiles of 64 bytes a row, of which b's have 16 rows and the others `rows`.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t first_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

constexpr std::array<TileConfiguration, kTile + 1> tile_configurations() {
  std::array<TileConfiguration, kTile + 1> all;
  for (int rows = 1; rows <= kTile; ++rows) {
    for (int tile = 0; tile < 8; ++tile) all[rows].rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTile);
  }
  return all;
}

// GCC takes LDTILECFG to read eight bytes only: the object must not be one whose other bytes it can leave unwritten.
void configure_tiles(int64_t rows) {
  static constexpr std::array<TileConfiguration, kTile + 1> configurations = tile_configurations();
  _tile_loadconfig(&configurations[rows]);
}

void release_tiles() { _tile_release(); }

}  // namespace

void multiply(LeftOperand a, RightOperand b, float* c, int64_t ldc, int64_t rows, int64_t columns, int64_t pairs,
              bool accumulate, bool by_tiles) {
  // GCC does not know that tile loads read memory: what was written before must be there.
  asm volatile("" ::: "memory");
  const int64_t tile_pairs = by_tiles ? pairs / kTile * kTile : 0;
  const int64_t whole_rows = rows / kTile * kTile, last_rows = rows - whole_rows;
  if (tile_pairs > 0) multiply_by_tiles(a, b, c, ldc, whole_rows, columns, tile_pairs, accumulate);
  if (tile_pairs > 0 && last_rows > 0) {
    configure_tiles(last_rows);
    multiply_by_tiles(from_row(a, whole_rows), b, c + whole_rows * ldc, ldc, last_rows, columns, tile_pairs,
                      accumulate);
    configure_tiles(kTile);
  }
  if (tile_pairs < pairs) {
    const LeftOperand rest_of_a = {a.data + tile_pairs / kTile * a.chunk, a.row, a.chunk};
    const RightOperand rest_of_b = {b.data + tile_pairs * b.line, b.line, b.chunk};
    multiply_by_dots(rest_of_a, rest_of_b, c, ldc, rows, columns, pairs - tile_pairs, accumulate || tile_pairs > 0);
  }
}

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_END

namespace megatron_sip {

TileScope::TileScope() {
  if (tile_products()) configure_tiles(kTile);
}

TileScope::~TileScope() {
  if (tile_products()) release_tiles();
}

}  // namespace megatron_sip
