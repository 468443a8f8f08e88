// Operators over whole packed rows on top of the block kernels: which queries see which keys, laid-out keys, threads.
//
// Forward is split over (head, block). Backward is split over (head, group): a group's blocks of one head add to the
// same key gradients, in a fixed order. So results do not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "bf16_products.h"
#include "instruction_set.h"
#include "tree_attention_kernels.h"

namespace megatron_sip {
namespace {

using at::Tensor;

// The queries of a prefix and its branches.
using Group = std::vector<QueryBlock>;

void add_blocks(Group& blocks, int64_t begin, int64_t end, std::array<KeyRange, 2> ranges, int range_count) {
  for (int64_t q = begin; q < end; q += kAttentionBlock) {
    const int64_t count = std::min(kAttentionBlock, end - q);
    ranges[range_count - 1] = {begin, q + count - begin};
    blocks.push_back({q, count, ranges, range_count});
  }
}

// Threads write groups and branches without locks, so none may overlap.
void check_line(const int64_t* line, int64_t b, int64_t row_length) {
  const int64_t start = line[0], prefix_end = line[1], branch_start = line[2], branch_end = line[3];
  TORCH_CHECK_VALUE(0 <= start && start < prefix_end && prefix_end <= branch_start && branch_start < branch_end &&
                        branch_end <= row_length,
                    "line ", b, " of the layout is [", start, ", ", prefix_end, ", ", branch_start, ", ", branch_end,
                    "] in a row of ", row_length, " tokens");
  if (b == 0) return;
  const int64_t* last = line - 4;
  const bool same_group = start == last[0] && prefix_end == last[1];
  TORCH_CHECK_VALUE((same_group ? branch_start : start) >= last[3], "line ", b, " of the layout, [", start, ", ",
                    prefix_end, ", ", branch_start, ", ", branch_end, "], overlaps the line before it, [", last[0],
                    ", ", last[1], ", ", last[2], ", ", last[3], "]");
}

// The query blocks of each group from the layout's lines (group start, prefix end, branch start, branch end).
std::vector<Group> query_blocks(const Tensor& layout, int64_t row_length) {
  const Tensor lines = layout.to(at::kLong).contiguous();
  const int64_t* line = lines.const_data_ptr<int64_t>();
  std::vector<Group> groups;
  for (int64_t b = 0; b < lines.size(0); ++b, line += 4) {
    const int64_t start = line[0], prefix_end = line[1], branch_start = line[2], branch_end = line[3];
    check_line(line, b, row_length);
    if (b == 0 || line[-4] != start) {
      groups.emplace_back();
      add_blocks(groups.back(), start, prefix_end, {}, 1);
    }
    add_blocks(groups.back(), branch_start, branch_end, {KeyRange{start, prefix_end - start}}, 2);
  }
  return groups;
}

const uint16_t* bits(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }
uint16_t* mutable_bits(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

template <typename T, typename Pointer>
HeadRows<T> head_rows(Pointer* data, const Tensor& tensor, int64_t head) {
  return {data + head * tensor.stride(1), tensor.stride(0)};
}

void check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& layout, double scale) {
  TORCH_CHECK_VALUE(query.dim() == 3 && key.dim() == 3 && value.sizes() == key.sizes() &&
                        key.size(0) == query.size(0) && key.size(2) == query.size(2) && key.size(1) > 0 &&
                        query.size(1) % key.size(1) == 0,
                    "query must be [S, H, D], key and value [S, G, D] with H a multiple of G, got ", query.sizes(),
                    ", ", key.sizes(), ", ", value.sizes());
  TORCH_CHECK_VALUE(query.size(2) > 0 && query.size(2) % 16 == 0, "the head dimension must be a multiple of 16, got ",
                    query.size(2));
  TORCH_CHECK_TYPE(query.scalar_type() == at::kBFloat16 && key.scalar_type() == at::kBFloat16 &&
                       value.scalar_type() == at::kBFloat16,
                   "query, key and value must be bfloat16, got ", query.scalar_type(), ", ", key.scalar_type(), ", ",
                   value.scalar_type());
  TORCH_CHECK_VALUE(layout.dim() == 2 && layout.size(1) == 4, "layout must be [B, 4], got ", layout.sizes());
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, got ", scale);
  TORCH_CHECK(avx512_bf16_usable(), "this processor has no AVX-512 bfloat16 instructions");
}

// What backward gets beside the arguments of forward: its results, and the gradient of the first.
void check_results(const Tensor& grad, const Tensor& out, const Tensor& lse, const Tensor& query) {
  TORCH_CHECK_VALUE(grad.sizes() == query.sizes() && out.sizes() == query.sizes(),
                    "grad and out must have the shape of query, ", query.sizes(), ", got ", grad.sizes(), " and ",
                    out.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kBFloat16 && out.scalar_type() == at::kBFloat16,
                   "grad and out must be bfloat16, got ", grad.scalar_type(), " and ", out.scalar_type());
  TORCH_CHECK_TYPE(lse.scalar_type() == at::kFloat, "lse must be float32, got ", lse.scalar_type());
  TORCH_CHECK_VALUE(lse.sizes() == query.sizes().slice(0, 2), "lse must be ", query.sizes().slice(0, 2), ", got ",
                    lse.sizes());
}

// Heads [S, G, D] as rows [G, padded, D] and, on request, as columns [G, D, padded]. Zeros pad the tokens, so that the
// lines of the columns begin at cache lines.
struct LaidOutHeads {
  int64_t padded;
  Tensor rows, columns;

  LaidOutHeads(const Tensor& heads, bool with_columns) {
    const int64_t length = heads.size(0), count = heads.size(1), dim = heads.size(2);
    padded = (length + 31) / 32 * 32;
    rows = at::empty({count, padded, dim}, heads.options());
    rows.narrow(1, 0, length).copy_(heads.transpose(0, 1));
    rows.narrow(1, length, padded - length).zero_();
    if (!with_columns) return;
    columns = at::empty({count, dim, padded}, heads.options());
    // torch transposes one matrix by blocks, several at once element by element.
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) columns[head].copy_(rows[head].t());
    });
  }
};

// [heads, S, D] in float32 -> bfloat16 [S, heads / shared, D]: factor times the sum over neighbouring heads.
Tensor sum_shared_heads(const Tensor& gradients, int64_t shared, double factor) {
  const int64_t count = gradients.size(0) / shared, length = gradients.size(1), dim = gradients.size(2);
  const Tensor sums = shared == 1 ? gradients : gradients.view({count, shared, length, dim}).sum(1);
  return (factor == 1.0 ? sums : sums * factor)
      .transpose(0, 1)
      .to(at::kBFloat16, false, false, at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_in, const Tensor& key, const Tensor& value, const Tensor& layout,
                                   double scale) {
  check(query_in, key, value, layout, scale);
  const Tensor query = query_in.contiguous();
  const int64_t length = query.size(0), heads = query.size(1), dim = query.size(2), shared = heads / key.size(1);
  const std::vector<Group> groups = query_blocks(layout, length);
  std::vector<QueryBlock> blocks;
  for (const Group& group : groups) blocks.insert(blocks.end(), group.begin(), group.end());
  const LaidOutHeads keys(key, false), values(value, true);
  // Tokens of no group stay zero, here and in the gradients.
  Tensor out = at::zeros_like(query), lse = at::zeros({length, heads}, query.options().dtype(at::kFloat));
  float* lse_data = lse.mutable_data_ptr<float>();
  uint16_t* out_data = mutable_bits(out);
  const int64_t padded = keys.padded, block_count = static_cast<int64_t>(blocks.size());
  at::parallel_for(0, heads * block_count, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({forward_scratch_size(length, dim)}, at::kFloat);
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / block_count, offset = head / shared * padded * dim;
      const PreparedKeys prepared = {bits(keys.rows) + offset,      nullptr, nullptr,
                                     bits(values.columns) + offset, padded,  dim};
      attention_forward_block(blocks[task % block_count], prepared, head_rows<const uint16_t>(bits(query), query, head),
                              scale, head_rows<uint16_t>(out_data, out, head), head_rows<float>(lse_data, lse, head),
                              scratch.data_ptr<float>());
    }
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& query_in, const Tensor& key,
                                            const Tensor& value, const Tensor& out_in, const Tensor& lse,
                                            const Tensor& layout, double scale) {
  check(query_in, key, value, layout, scale);
  check_results(grad_in, out_in, lse, query_in);
  const Tensor query = query_in.contiguous(), grad_out = grad_in.contiguous(), out = out_in.contiguous();
  const int64_t length = query.size(0), heads = query.size(1), dim = query.size(2), shared = heads / key.size(1);
  const std::vector<Group> groups = query_blocks(layout, length);
  const LaidOutHeads keys(key, true), values(value, false);
  Tensor grad_query = at::zeros_like(query);
  Tensor grad_key = at::zeros({heads, length, dim}, query.options().dtype(at::kFloat));
  Tensor grad_value = at::zeros_like(grad_key);
  float *grad_key_data = grad_key.mutable_data_ptr<float>(), *grad_value_data = grad_value.mutable_data_ptr<float>();
  const float* lse_data = lse.const_data_ptr<float>();
  uint16_t* grad_query_data = mutable_bits(grad_query);
  const int64_t tasks = heads * static_cast<int64_t>(groups.size()), padded = keys.padded;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({backward_scratch_size(dim)}, at::kFloat);
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads, offset = head / shared * padded * dim;
      const PreparedKeys prepared = {
          bits(keys.rows) + offset, bits(values.rows) + offset, bits(keys.columns) + offset, nullptr, padded, dim};
      for (const QueryBlock& block : groups[task / heads]) {
        attention_backward_block(
            block, prepared, head_rows<const uint16_t>(bits(query), query, head),
            head_rows<const uint16_t>(bits(out), out, head), head_rows<const float>(lse_data, lse, head),
            head_rows<const uint16_t>(bits(grad_out), grad_out, head), scale,
            head_rows<uint16_t>(grad_query_data, grad_query, head), grad_key_data + head * length * dim,
            grad_value_data + head * length * dim, scratch.data_ptr<float>());
      }
    }
  });
  return {grad_query, sum_shared_heads(grad_key, shared, scale), sum_shared_heads(grad_value, shared, 1.0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_sip, library) {
  library.def("tree_attention_supported() -> bool", [] { return avx512_bf16_usable(); });
  library.def("tree_attention(Tensor query, Tensor key, Tensor value, Tensor layout, float scale) -> (Tensor, Tensor)");
  library.def(
      "tree_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor layout, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(megatron_sip, CPU, library) {
  library.impl("tree_attention", &forward);
  library.impl("tree_attention_backward", &backward);
}

}  // namespace megatron_sip
