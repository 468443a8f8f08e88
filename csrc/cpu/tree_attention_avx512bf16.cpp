// The block kernels of tree_attention_kernels.h for AVX-512 with bfloat16 dot products.
#include "tree_attention_kernels.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bf16_products.h"
#include "instruction_set.h"

MEGATRON_SIP_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

#include "avx512bf16_lanes.h"

namespace megatron_sip {
namespace {

constexpr int64_t kVectors = kAttentionBlock / kLanes;

// 16 lines of 16 pairs of the block's rows from pair p on, zeros beyond the block and beyond `dim`.
inline void load_pairs(const QueryBlock& block, HeadRows<const uint16_t> rows, int64_t dim, int64_t q, int64_t p,
                       __m512i (&lines)[kLanes]) {
  const __mmask16 there = static_cast<__mmask16>((1u << std::min(kLanes, dim / 2 - p)) - 1);
  for (int64_t i = 0; i < kLanes; ++i) {
    const __mmask16 mask = q + i < block.count ? there : 0;
    const int64_t token = block.begin + std::min(q + i, block.count - 1);
    lines[i] = _mm512_maskz_loadu_epi32(mask, rows.data + token * rows.stride + 2 * p);
  }
}

// The block's rows with columns interleaved in pairs, [dim / 2, 64]: the transposed matrix as a right operand.
void pair_columns(const QueryBlock& block, HeadRows<const uint16_t> rows, int64_t dim, uint32_t* to) {
  __m512i lines[kLanes];
  for (int64_t q = 0; q < kAttentionBlock; q += kLanes) {
    for (int64_t p = 0; p < dim / 2; p += kLanes) {
      load_pairs(block, rows, dim, q, p, lines);
      transpose_lines(lines);
      for (int64_t i = 0; i < std::min(kLanes, dim / 2 - p); ++i) {
        _mm512_storeu_si512(to + (p + i) * kAttentionBlock + q, lines[i]);
      }
    }
  }
}

// The block's rows interleaved in pairs, [32, dim]: the matrix itself as a right operand.
void pair_rows(const QueryBlock& block, HeadRows<const uint16_t> rows, int64_t dim, uint32_t* to) {
  for (int64_t q = 0; q < kAttentionBlock; q += 2) {
    const uint16_t* even = rows.data + (block.begin + q) * rows.stride;
    for (int64_t d = 0; d < dim; d += kLanes) {
      _mm512_storeu_si512(to + q / 2 * dim + d,
                          interleave_rows(even + d, q < block.count, even + rows.stride + d, q + 1 < block.count));
    }
  }
}

// Calls visit(first key, number of keys, whether these are the block's own tokens) for at most 64 keys at a time.
template <typename Visit>
void for_each_key_block(const QueryBlock& block, Visit visit) {
  for (int r = 0; r < block.range_count; ++r) {
    const KeyRange range = block.ranges[r];
    for (int64_t k = 0; k < range.length; k += kAttentionBlock) {
      const int64_t count = std::min(kAttentionBlock, range.length - k);
      visit(range.begin + k, count, r + 1 == block.range_count && k + kAttentionBlock >= range.length);
    }
  }
}

// Lanes of vector v whose query sees key `row` of a key block.
inline __mmask16 visible_lanes(int64_t row, int64_t keys, bool own, int64_t v) {
  if (row >= keys) return 0;
  if (!own) return 0xFFFF;
  const int64_t hidden = std::clamp<int64_t>(row - v * kLanes, 0, kLanes);
  return static_cast<__mmask16>(0xFFFFu << hidden);
}

int64_t round_up_even(int64_t n) { return n + (n & 1); }

// `count` columns of transposed keys as a left operand. Beside the last of an odd number stands a token that these
// queries do not see, maybe of another group: its weight is 0, but 0 times what is not finite is NaN. So they are
// copied to `copy` [dim, 64] without it.
LeftOperand key_columns(const uint16_t* columns, int64_t stride, int64_t dim, int64_t count, uint16_t* copy) {
  if (count % 2 == 0) return {columns, stride};
  constexpr int64_t kHalf = kAttentionBlock / 2;
  const uint64_t there = (uint64_t{1} << count) - 1;
  for (int64_t d = 0; d < dim; ++d, columns += stride) {
    uint16_t* to = copy + d * kAttentionBlock;
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(there), columns));
    _mm512_storeu_si512(to + kHalf, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(there >> kHalf), columns + kHalf));
  }
  return {copy, kAttentionBlock};
}

// Writes factor times the columns of `from`, float32 [dim, 64], to the block's tokens.
void store_columns(const QueryBlock& block, const float* from, int64_t dim, float factor, HeadRows<uint16_t> to) {
  __m512i lines[kLanes];
  for (int64_t q = 0; q < block.count; q += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) lines[i] = _mm512_loadu_si512(from + (d + i) * kAttentionBlock + q);
      transpose_lines(lines);
      for (int64_t i = 0; i < std::min(kLanes, block.count - q); ++i) {
        const __m512 values = _mm512_mul_ps(_mm512_castsi512_ps(lines[i]), _mm512_set1_ps(factor));
        store_bf16(to.data + (block.begin + q + i) * to.stride + d, values);
      }
    }
  }
}

// Raises `largest` to the maxima of the columns of one key block's transposed scores; makes hidden scores -inf.
void mask_and_find_largest(float* scores, int64_t count, bool own, __m512* largest) {
  const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const bool all_visible = !own && count % 2 == 0;
  for (int64_t row = 0; row < round_up_even(count); ++row) {
    for (int64_t v = 0; v < kVectors; ++v) {
      float* at = scores + row * kAttentionBlock + v * kLanes;
      __m512 score = _mm512_loadu_ps(at);
      if (!all_visible) {
        score = _mm512_mask_mov_ps(hidden, visible_lanes(row, count, own, v), score);
        _mm512_storeu_ps(at, score);
      }
      largest[v] = _mm512_max_ps(largest[v], score);
    }
  }
}

// Softmax weights 2^(factor * score - largest), row pairs interleaved; adds their float32 values to `sums`.
void exponentiate(const float* scores, int64_t count, __m512 factor, const __m512* largest, __m512* sums,
                  uint32_t* weights) {
  for (int64_t row = 0; row < count; row += 2) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const float* at = scores + row * kAttentionBlock + v * kLanes;
      const __m512 even = rough_exp2_lanes(_mm512_fmsub_ps(_mm512_loadu_ps(at), factor, largest[v]));
      const __m512 odd = rough_exp2_lanes(_mm512_fmsub_ps(_mm512_loadu_ps(at + kAttentionBlock), factor, largest[v]));
      sums[v] = _mm512_add_ps(sums[v], _mm512_add_ps(even, odd));
      _mm512_storeu_si512(weights + row / 2 * kAttentionBlock + v * kLanes, interleave_bf16(even, odd));
    }
  }
}

// The queries' log-sum-exp in base 2, and sum of out * grad_out. Queries beyond the block's count have zero vectors
// and, with an infinite normaliser, zero weights.
void prepare_queries(const QueryBlock& block, int64_t dim, HeadRows<const uint16_t> out, HeadRows<const float> lse,
                     HeadRows<const uint16_t> grad_out, float* normalisers, float* deltas) {
  for (int64_t q = 0; q < kAttentionBlock; ++q) {
    normalisers[q] = std::numeric_limits<float>::infinity();
    deltas[q] = 0;
    if (q >= block.count) continue;
    const int64_t token = block.begin + q;
    normalisers[q] = lse.data[token * lse.stride] * kLog2E;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += kLanes) {
      sum = _mm512_fmadd_ps(load_bf16(out.data + token * out.stride + d),
                            load_bf16(grad_out.data + token * grad_out.stride + d), sum);
    }
    deltas[q] = _mm512_reduce_add_ps(sum);
  }
}

struct ScoreGradients {
  uint16_t* weights;      // [64, 64]
  uint16_t* gradients;    // [64, 64]
  uint32_t* interleaved;  // [32, 64], the gradients with row pairs interleaved
};

// One key block's weights and score gradients from its transposed scores and weight gradients.
void score_gradients(const float* scores, const float* weight_grads, int64_t count, bool own, __m512 factor,
                     const float* normalisers, const float* deltas, ScoreGradients to) {
  for (int64_t row = 0; row < count; row += 2) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const __m512 normaliser = _mm512_load_ps(normalisers + v * kLanes);
      const __m512 delta = _mm512_load_ps(deltas + v * kLanes);
      __m512 gradient[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = (row + i) * kAttentionBlock + v * kLanes;
        const __mmask16 visible = visible_lanes(row + i, count, own, v);
        const __m512 exponent = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), factor, normaliser);
        const __m512 weight = _mm512_maskz_mov_ps(visible, rough_exp2_lanes(exponent));
        gradient[i] = _mm512_maskz_mul_ps(visible, weight, _mm512_sub_ps(_mm512_loadu_ps(weight_grads + at), delta));
        store_bf16(to.weights + at, weight);
        store_bf16(to.gradients + at, gradient[i]);
      }
      _mm512_storeu_si512(to.interleaved + row / 2 * kAttentionBlock + v * kLanes,
                          interleave_bf16(gradient[0], gradient[1]));
    }
  }
}

}  // namespace

// Forward scratch: queries in column pairs [dim / 2, 64], weights [32, 64], output [dim, 64], copied columns in
// bfloat16 [dim, 64], scores [keys, 64].
int64_t forward_scratch_size(int64_t keys, int64_t dim) {
  return (dim / 2 + kAttentionBlock / 2 + dim + dim / 2 + keys + 3 * kAttentionBlock) * kAttentionBlock;
}

void attention_forward_block(const QueryBlock& block, const PreparedKeys& keys, HeadRows<const uint16_t> query,
                             float scale, HeadRows<uint16_t> out, HeadRows<float> lse, float* scratch) {
  const int64_t dim = keys.dim, block_size = kAttentionBlock * kAttentionBlock;
  uint32_t* queries = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* weights = queries + dim / 2 * kAttentionBlock;
  float* output = scratch + (dim / 2 + kAttentionBlock / 2) * kAttentionBlock;
  uint16_t* copied_columns = reinterpret_cast<uint16_t*>(output + dim * kAttentionBlock);
  float* scores = output + (dim + dim / 2) * kAttentionBlock;
  pair_columns(block, query, dim, queries);

  __m512 largest[kVectors], sums[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    largest[v] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    sums[v] = _mm512_setzero_ps();
  }
  float* part = scores;
  for_each_key_block(block, [&](int64_t first, int64_t count, bool own) {
    multiply({keys.keys + first * dim, dim}, {queries, kAttentionBlock}, part, kAttentionBlock, count, kAttentionBlock,
             dim / 2, false);
    mask_and_find_largest(part, count, own, largest);
    part += block_size;
  });
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
  for (__m512& score : largest) score = _mm512_mul_ps(score, factor);
  part = scores;
  for_each_key_block(block, [&](int64_t first, int64_t count, bool) {
    exponentiate(part, count, factor, largest, sums, weights);
    multiply(key_columns(keys.values_transposed + first, keys.rows, dim, count, copied_columns),
             {weights, kAttentionBlock}, output, kAttentionBlock, dim, kAttentionBlock, round_up_even(count) / 2,
             part != scores);
    part += block_size;
  });

  alignas(64) float sum[kAttentionBlock], top[kAttentionBlock];
  for (int64_t v = 0; v < kVectors; ++v) {
    _mm512_store_ps(sum + v * kLanes, sums[v]);
    _mm512_store_ps(top + v * kLanes, largest[v]);
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), sums[v]);
    for (int64_t d = 0; d < dim; ++d) {
      float* at = output + d * kAttentionBlock + v * kLanes;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), share));
    }
  }
  store_columns(block, output, dim, 1.0f, out);
  for (int64_t q = 0; q < block.count; ++q) {
    lse.data[(block.begin + q) * lse.stride] = top[q] / kLog2E + std::log(sum[q]);
  }
}

// Backward scratch: queries and output gradients in column pairs [dim / 2, 64] and in row pairs [32, dim], scores and
// their gradients [64, 64], weights and score gradients in plain bfloat16 [64, 64], the latter in row pairs too,
// query gradients [dim, 64], copied columns in bfloat16 [dim, 64].
int64_t backward_scratch_size(int64_t dim) {
  return (2 * (dim / 2) + dim + 2 * kAttentionBlock + 3 * kAttentionBlock / 2 + dim + dim / 2) * kAttentionBlock;
}

void attention_backward_block(const QueryBlock& block, const PreparedKeys& keys, HeadRows<const uint16_t> query,
                              HeadRows<const uint16_t> out, HeadRows<const float> lse,
                              HeadRows<const uint16_t> grad_out, float scale, HeadRows<uint16_t> grad_query,
                              float* grad_key, float* grad_value, float* scratch) {
  const int64_t dim = keys.dim;
  uint32_t* query_columns = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* grad_columns = query_columns + dim / 2 * kAttentionBlock;
  uint32_t* query_rows = grad_columns + dim / 2 * kAttentionBlock;
  uint32_t* grad_rows = query_rows + kAttentionBlock / 2 * dim;
  float* scores = reinterpret_cast<float*>(grad_rows + kAttentionBlock / 2 * dim);
  float* weight_grads = scores + kAttentionBlock * kAttentionBlock;
  uint16_t* weights = reinterpret_cast<uint16_t*>(weight_grads + kAttentionBlock * kAttentionBlock);
  uint16_t* score_grads = weights + kAttentionBlock * kAttentionBlock;
  uint32_t* score_grad_pairs = reinterpret_cast<uint32_t*>(score_grads + kAttentionBlock * kAttentionBlock);
  float* query_grads = reinterpret_cast<float*>(score_grad_pairs + kAttentionBlock / 2 * kAttentionBlock);
  uint16_t* copied_columns = reinterpret_cast<uint16_t*>(query_grads + dim * kAttentionBlock);
  pair_columns(block, query, dim, query_columns);
  pair_columns(block, grad_out, dim, grad_columns);
  pair_rows(block, query, dim, query_rows);
  pair_rows(block, grad_out, dim, grad_rows);

  alignas(64) float normalisers[kAttentionBlock], deltas[kAttentionBlock];
  prepare_queries(block, dim, out, lse, grad_out, normalisers, deltas);
  const int64_t query_pairs = round_up_even(block.count) / 2;
  bool accumulate = false;
  for_each_key_block(block, [&](int64_t first, int64_t count, bool own) {
    multiply({keys.keys + first * dim, dim}, {query_columns, kAttentionBlock}, scores, kAttentionBlock, count,
             kAttentionBlock, dim / 2, false);
    multiply({keys.values + first * dim, dim}, {grad_columns, kAttentionBlock}, weight_grads, kAttentionBlock, count,
             kAttentionBlock, dim / 2, false);
    score_gradients(scores, weight_grads, count, own, _mm512_set1_ps(scale * kLog2E), normalisers, deltas,
                    {weights, score_grads, score_grad_pairs});
    multiply({weights, kAttentionBlock}, {grad_rows, dim}, grad_value + first * dim, dim, count, dim, query_pairs,
             true);
    multiply({score_grads, kAttentionBlock}, {query_rows, dim}, grad_key + first * dim, dim, count, dim, query_pairs,
             true);
    multiply(key_columns(keys.keys_transposed + first, keys.rows, dim, count, copied_columns),
             {score_grad_pairs, kAttentionBlock}, query_grads, kAttentionBlock, dim, kAttentionBlock,
             round_up_even(count) / 2, accumulate);
    accumulate = true;
  });
  store_columns(block, query_grads, dim, scale, grad_query);
}

}  // namespace megatron_sip

MEGATRON_SIP_TARGET_END
