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

#include "aligned_memory.h"
#include "bf16_products.h"
#include "tree_attention_kernels.h"

namespace megatron_sip {
namespace {

using at::Tensor;

// Tokens `begin` to `end`, and their queries.
struct Group {
  int64_t begin, end;
  std::vector<QueryBlock> blocks;
};

void add_blocks(std::vector<QueryBlock>& blocks, int64_t begin, int64_t end, std::array<KeyRange, 2> ranges,
                int range_count) {
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
      groups.push_back({start, prefix_end, {}});
      add_blocks(groups.back().blocks, start, prefix_end, {}, 1);
    }
    groups.back().end = branch_end;
    add_blocks(groups.back().blocks, branch_start, branch_end, {KeyRange{start, prefix_end - start}}, 2);
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
  TORCH_CHECK(tree_attention_kernels_supported(), "this processor has no AVX-512 bfloat16 instructions");
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

constexpr int64_t kTokensATask = 256;

// Lines of transposed keys begin at cache lines.
int64_t padded_length(int64_t length) { return (length + 31) / 32 * 32; }

// Heads [S, G, D] as rows [G, padded length, D] and, on request, as columns [G, D, padded length].
struct LaidOutHeads {
  Tensor rows, columns;

  LaidOutHeads(const Tensor& heads_in, bool with_columns) {
    const Tensor heads = heads_in.stride(2) == 1 ? heads_in : heads_in.contiguous();
    const int64_t length = heads.size(0), count = heads.size(1), dim = heads.size(2), padded = padded_length(length);
    rows = at::empty({count, padded, dim}, heads.options());
    if (with_columns) columns = at::empty({count, dim, padded}, heads.options());
    uint16_t* row_data = mutable_bits(rows);
    uint16_t* column_data = with_columns ? mutable_bits(columns) : nullptr;
    const int64_t tasks = (padded + kTokensATask - 1) / kTokensATask;
    at::parallel_for(0, count * tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t head = task / tasks, begin = task % tasks * kTokensATask, offset = head * padded * dim;
        lay_out_head(head_rows<const uint16_t>(bits(heads), heads, head), length, begin,
                     std::min(padded, begin + kTokensATask), dim, padded, row_data + offset,
                     with_columns ? column_data + offset : nullptr);
      }
    });
  }
};

// Sets the tokens [S, ...] of a contiguous tensor that are in no group's prefix or branch to zero.
void clear_uncovered(const Tensor& tensor, const std::vector<Group>& groups) {
  std::vector<bool> covered(tensor.size(0), false);
  for (const Group& group : groups) {
    for (const QueryBlock& block : group.blocks) {
      std::fill_n(covered.begin() + block.begin, block.count, true);
    }
  }
  const int64_t bytes = tensor.size(0) == 0 ? 0 : tensor.numel() / tensor.size(0) * tensor.element_size();
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  for (int64_t t = 0; t < tensor.size(0); ++t) {
    if (!covered[t]) std::memset(data + t * bytes, 0, bytes);
  }
}

// [heads, S, D] in float32 -> bfloat16 [S, heads / shared, D]: factor times the sum over neighbouring heads.
Tensor sum_shared_heads(const Tensor& gradients, int64_t shared, float factor, const std::vector<Group>& groups) {
  const int64_t length = gradients.size(1), dim = gradients.size(2), count = gradients.size(0) / shared;
  Tensor out = at::empty({length, count, dim}, gradients.options().dtype(at::kBFloat16));
  uint16_t* out_data = mutable_bits(out);
  const float* data = gradients.const_data_ptr<float>();
  at::parallel_for(0, length, kTokensATask, [&](int64_t begin, int64_t end) {
    for (int64_t head = 0; head < count; ++head) {
      sum_head_gradients(data + head * shared * length * dim, length * dim, shared, begin, end, dim, factor,
                         head_rows<uint16_t>(out_data, out, head));
    }
  });
  clear_uncovered(out, groups);
  return out;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_in, const Tensor& key, const Tensor& value, const Tensor& layout,
                                   double scale) {
  check(query_in, key, value, layout, scale);
  const Tensor query = query_in.contiguous();
  const int64_t length = query.size(0), heads = query.size(1), dim = query.size(2), shared = heads / key.size(1);
  const std::vector<Group> groups = query_blocks(layout, length);
  std::vector<QueryBlock> blocks;
  for (const Group& group : groups) blocks.insert(blocks.end(), group.blocks.begin(), group.blocks.end());
  const Tensor keys = LaidOutHeads(key, false).rows, values = LaidOutHeads(value, true).columns;
  Tensor out = at::empty_like(query), lse = at::empty({length, heads}, query.options().dtype(at::kFloat));
  clear_uncovered(out, groups);
  clear_uncovered(lse, groups);
  float* lse_data = lse.mutable_data_ptr<float>();
  uint16_t* out_data = mutable_bits(out);
  const int64_t padded = padded_length(length), block_count = static_cast<int64_t>(blocks.size());
  at::parallel_for(0, heads * block_count, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_memory<float>(forward_scratch_size(length, dim));
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / block_count, offset = head / shared * padded * dim;
      const PreparedKeys prepared = {bits(keys) + offset, nullptr, nullptr, bits(values) + offset, padded, dim};
      attention_forward_block(blocks[task % block_count], prepared, head_rows<const uint16_t>(bits(query), query, head),
                              scale, head_rows<uint16_t>(out_data, out, head), head_rows<float>(lse_data, lse, head),
                              scratch.get());
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
  Tensor grad_query = at::empty_like(query);
  clear_uncovered(grad_query, groups);
  Tensor grad_key = at::empty({heads, length, dim}, query.options().dtype(at::kFloat));
  Tensor grad_value = at::empty_like(grad_key);
  float *grad_key_data = grad_key.mutable_data_ptr<float>(), *grad_value_data = grad_value.mutable_data_ptr<float>();
  const float* lse_data = lse.const_data_ptr<float>();
  uint16_t* grad_query_data = mutable_bits(grad_query);
  const int64_t tasks = heads * static_cast<int64_t>(groups.size()), padded = padded_length(length);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_memory<float>(backward_scratch_size(dim));
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads, offset = head / shared * padded * dim;
      const PreparedKeys prepared = {
          bits(keys.rows) + offset, bits(values.rows) + offset, bits(keys.columns) + offset, nullptr, padded, dim};
      const Group& group = groups[task / heads];
      for (float* grads : {grad_key_data, grad_value_data}) {
        std::fill_n(grads + (head * length + group.begin) * dim, (group.end - group.begin) * dim, 0.0f);
      }
      for (const QueryBlock& block : group.blocks) {
        attention_backward_block(
            block, prepared, head_rows<const uint16_t>(bits(query), query, head),
            head_rows<const uint16_t>(bits(out), out, head), head_rows<const float>(lse_data, lse, head),
            head_rows<const uint16_t>(bits(grad_out), grad_out, head), scale,
            head_rows<uint16_t>(grad_query_data, grad_query, head), grad_key_data + head * length * dim,
            grad_value_data + head * length * dim, scratch.get());
      }
    }
  });
  return {grad_query, sum_shared_heads(grad_key, shared, static_cast<float>(scale), groups),
          sum_shared_heads(grad_value, shared, 1.0f, groups)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megatron_sip, library) {
  library.def("tree_attention_supported() -> bool", [] { return tree_attention_kernels_supported(); });
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
