"""Attention over SGLang's paged KV cache on a CPU, for all sequences of a step at once.

SGLang's own torch backend calls torch once for each sequence and layer, and in a prefill also recomputes the queries
of the cached prefix. Here a decode step is one call per layer, over keys padded to the longest sequence, and a prefill
computes only new queries. `sglang_cpu` plugs these functions in.

Shapes: query and output [tokens, query heads, size]; caches [slots, KV heads, size]; req_to_token [requests, context]
holds the cache slot of each token of a request; req_pool_indices and all lengths are integers, one a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def decode_attention(
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    *,
    scaling: float | None,
) -> Tensor:
    """Write into `output` the attention of one query per sequence over its first `seq_lens` tokens.

    The query heads of a KV head stand in the place of query positions, so grouped-query attention copies nothing.
    """
    longest = int(seq_lens.max())
    valid = torch.arange(longest) < seq_lens[:, None]
    # Beyond a sequence's end the table holds slots of other requests, or none.
    slots = req_to_token[req_pool_indices, :longest].long().masked_fill(~valid, 0)
    batch, heads, size = query.shape
    kv_heads = k_cache.shape[1]
    result = scaled_dot_product_attention(
        query.reshape(batch, kv_heads, heads // kv_heads, size),
        k_cache[slots].transpose(1, 2).to(query.dtype),
        v_cache[slots].transpose(1, 2).to(query.dtype),
        valid[:, None, None, :],
        scale=scaling,
    )
    output.copy_(result.reshape(batch, heads, v_cache.shape[-1]))
    return output


def extend_attention(
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_prefix_lens: Tensor,
    extend_seq_lens: Tensor,
    *,
    scaling: float | None,
) -> Tensor:
    """Write into `output` the causal attention of each sequence's last `extend_seq_lens` tokens (its new ones).

    The first `extend_prefix_lens` tokens of a sequence are in the cache already; new tokens lie one sequence after
    another in `query`.
    """
    new_lens = extend_seq_lens.tolist()
    if max(new_lens) == 1:  # further samples of a prompt whose prefix is cached: the same as a decode step
        return decode_attention(
            query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, scaling=scaling
        )
    start = 0
    for request, cached, new in zip(req_pool_indices.tolist(), extend_prefix_lens.tolist(), new_lens, strict=True):
        slots = req_to_token[request, : cached + new].long()
        # [tokens, heads, size] -> [1, heads, tokens, size]
        q, k, v = (t.transpose(0, 1)[None] for t in (query[start : start + new], k_cache[slots], v_cache[slots]))
        mask = torch.ones(new, cached + new, dtype=torch.bool).tril(cached) if cached else None
        result = scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        output[start : start + new] = result[0].transpose(0, 1)
        start += new
    return output
