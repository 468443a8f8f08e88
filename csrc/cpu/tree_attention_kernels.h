// Attention of one block of up to 64 queries on the keys it may see, bfloat16 in, float32 inside.
//
// Scores are kept transposed, [keys, queries]: softmax runs down the columns without horizontal sums, and every product
// of forward and backward takes one operand in plain rows and the other with pairs of rows interleaved, which is what
// the bfloat16 dot product instruction wants, without transposing a score matrix.
#pragma once

#include <array>
#include <cstdint>

namespace megatron_sip {

constexpr int64_t kAttentionBlock = 64;

struct KeyRange {
  int64_t begin;
  int64_t length;
};

// `count` queries from token `begin`. They see every key of all ranges but the last one, and of the last, which ends
// with the block's own last token, those up to themselves: the last range's final key block is the block itself.
struct QueryBlock {
  int64_t begin;
  int64_t count;
  std::array<KeyRange, 2> ranges;
  int range_count;
};

// Key and value heads laid out for the kernels. `rows` is the row length, up to a multiple of 32.
struct PreparedKeys {
  const uint16_t* keys;               // [rows, dim]
  const uint16_t* values;             // [rows, dim]
  const uint16_t* keys_transposed;    // [dim, rows], backward only
  const uint16_t* values_transposed;  // [dim, rows], forward only
  int64_t rows;
  int64_t dim;  // a multiple of 16
};

// Tokens of one head: token t at data + t * stride.
template <typename T>
struct HeadRows {
  T* data;
  int64_t stride;
};

// float32 values of scratch memory that a thread needs for rows of up to `keys` tokens.
int64_t forward_scratch_size(int64_t keys, int64_t dim);
int64_t backward_scratch_size(int64_t dim);

// Both need the thread's TileScope, and a positive `scale`. `scratch` begins at a cache line.
//
// Writes out and lse (natural log of the sum of exp(scale * score)) of the block's queries.
void attention_forward_block(const QueryBlock& block, const PreparedKeys& keys, HeadRows<const uint16_t> query,
                             float scale, HeadRows<uint16_t> out, HeadRows<float> lse, float* scratch);

// Writes grad_query of the block's queries and adds to grad_key and grad_value, float32 [rows, dim]; grad_key without
// the factor `scale`.
void attention_backward_block(const QueryBlock& block, const PreparedKeys& keys, HeadRows<const uint16_t> query,
                              HeadRows<const uint16_t> out, HeadRows<const float> lse,
                              HeadRows<const uint16_t> grad_out, float scale, HeadRows<uint16_t> grad_query,
                              float* grad_key, float* grad_value, float* scratch);

}  // namespace megatron_sip
