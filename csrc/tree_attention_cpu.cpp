// Operators over whole packed rows on top of the block kernels: which queries see which keys, laid-out keys, threads.
//
// Forward is split over (head, block). Backward is split over (head, group): a group's blocks of one head add to the same
// key gradients, in a fixed order. So results do not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "aligned_memory.h"
#include "bf16_products.h"
#include "tree_attention_kernels.h"

namespace megatron_sip {
namespace {

using at::Tensor;

using Group = std::vector<QueryBlock>;

void add_blocks(Group& group, int64_t begin, int64_t end, std::array<KeyRange, 2> ranges, int range_count) {
  for (int64_t q = begin; q < end; q += kAttentionBlock) {
    const int64_t count = std::min(kAttentionBlock, end - q);
    ranges[range_count - 1] = {begin, q + count - begin};
    group.push_back({q, count, ranges, range_count});
  }
}

// The query blocks of each group from the layout's lines (group start, prefix end, branch start, branch end).
std::vector<Group> query_blocks(const Tensor& layout, int64_t row_length) {
  const Tensor lines = layout.to(at::kLong).contiguous();
  const int64_t* line = lines.const_data_ptr<int64_t>();
  std::vector<Group> groups;
  for (int64_t b = 0; b < lines.size(0); ++b, line += 4) {
    const int64_t start = line[0], prefix_end = line[1], branch_start = line[2], branch_end = line[3];
    TORCH_CHECK_VALUE(0 <= start && start < prefix_end && prefix_end <= branch_start && branch_start < branch_end &&
                          branch_end <= row_length,
                      "line ", b, " of the layout is [", start, ", ", prefix_end, ", ", branch_start, ", ", branch_end,
                      "] in a row of ", row_length, " tokens");
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

void check(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& layout,
           double scale) {
  TORCH_CHECK_VALUE(query.dim() == 3 && key.dim() == 3 && value.sizes() == key.sizes() &&
                        key.size(0) == query.size(0) && key.size(2) == query.size(2) && key.size(1) > 0 &&
                        query.size(1) % key.size(1) == 0,
                    "query must be [S, H, D], key and value [S, G, D] with H a multiple of G, got ", query.sizes(),
                    ", ", key.sizes(), ", ", value.sizes());
  TORCH_CHECK_VALUE(query.size(2) % 16 == 0, "the head dimension must be a multiple of 16, got ", query.size(2));
  TORCH_CHECK_TYPE(query.scalar_type() == at::kBFloat16 && key.scalar_type() == at::kBFloat16 &&
                       value.scalar_type() == at::kBFloat16,
                   "query, key and value must be bfloat16");
  TORCH_CHECK_VALUE(layout.dim() == 2 && layout.size(1) == 4, "layout must be [B, 4], got ", layout.sizes());
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, got ", scale);
  TORCH_CHECK(tree_attention_kernels_supported(), "this processor has no AVX-512 bfloat16 instructions");
}

// A product may read one token past the last, with weight zero; lines of transposed keys begin at cache lines.
int64_t padded_length(int64_t length) { return length / 32 * 32 + 32; }

// [S, G, D] -> [G, padded length, D]
Tensor by_head(const Tensor& tensor) {
  const int64_t length = tensor.size(0);
  return at::constant_pad_nd(tensor.transpose(0, 1), {0, 0, 0, padded_length(length) - length}).contiguous();
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_in, const Tensor& key, const Tensor& value, const Tensor& layout,
                                   double scale) {
  check(query_in, key, value, layout, scale);
  const Tensor query = query_in.contiguous();
  const int64_t length = query.size(0), heads = query.size(1), dim = query.size(2), shared = heads / key.size(1);
  std::vector<QueryBlock> blocks;
  for (const Group& group : query_blocks(layout, length)) blocks.insert(blocks.end(), group.begin(), group.end());
  const Tensor keys = by_head(key), values = by_head(value).transpose(1, 2).contiguous();
  Tensor out = at::zeros_like(query);
  Tensor lse = at::zeros({length, heads}, query.options().dtype(at::kFloat));
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
                                            const Tensor& value, const Tensor& out, const Tensor& lse,
                                            const Tensor& layout, double scale) {
  check(query_in, key, value, layout, scale);
  const Tensor query = query_in.contiguous(), grad_out = grad_in.contiguous();
  const int64_t length = query.size(0), heads = query.size(1), dim = query.size(2), shared = heads / key.size(1);
  const std::vector<Group> groups = query_blocks(layout, length);
  const Tensor keys = by_head(key), values = by_head(value), transposed = keys.transpose(1, 2).contiguous();
  Tensor grad_query = at::zeros_like(query);
  Tensor grad_key = at::zeros({heads, length, dim}, query.options().dtype(at::kFloat));
  Tensor grad_value = at::zeros_like(grad_key);
  float *grad_key_data = grad_key.mutable_data_ptr<float>(), *grad_value_data = grad_value.mutable_data_ptr<float>();
  const float* lse_data = lse.const_data_ptr<float>();
  uint16_t* grad_query_data = mutable_bits(grad_query);
  const int64_t tasks = heads * static_cast<int64_t>(groups.size()), padded = padded_length(length);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_memory<float>(backward_scratch_size(dim));
    const TileScope tiles;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads, kv = head / shared, offset = kv * padded * dim;
      const PreparedKeys prepared = {bits(keys) + offset, bits(values) + offset, bits(transposed) + offset, nullptr,
                                     padded, dim};
      for (const QueryBlock& block : groups[task / heads]) {
        attention_backward_block(block, prepared, head_rows<const uint16_t>(bits(query), query, head),
                                 head_rows<const uint16_t>(bits(out), out, head),
                                 head_rows<const float>(lse_data, lse, head),
                                 head_rows<const uint16_t>(bits(grad_out), grad_out, head), scale,
                                 head_rows<uint16_t>(grad_query_data, grad_query, head),
                                 grad_key_data + head * length * dim, grad_value_data + head * length * dim,
                                 scratch.get());
      }
    }
  });
  const auto of_shared_head = [&](const Tensor& grad, double factor) {
    const Tensor sum = grad.view({key.size(1), shared, length, dim}).sum(1).transpose(0, 1);
    return (factor == 1.0 ? sum : sum * factor).to(at::kBFloat16).contiguous();
  };
  return {grad_query, of_shared_head(grad_key, scale), of_shared_head(grad_value, 1.0)};
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
