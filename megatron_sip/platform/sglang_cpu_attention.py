"""Attention for SGLang on a CPU that takes all sequences of a decode step at once.

SGLang's torch_native backend calls torch once for each sequence and layer, and in a prefill also recomputes the
queries of the cached prefix. Here a decode step is one call a layer over keys padded to the longest sequence, and a
prefill computes only new queries. Plain self-attention only: anything else is left to the base class.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class BatchedCpuAttention(TorchNativeAttnBackend):
    """`torch_native` with the two loops over sequences replaced. Shapes are the base class's."""

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        sliding_window_size: int | None = None,
        **flags: Any,
    ) -> Tensor:
        if encoder_lens is not None or sliding_window_size is not None:
            return super()._run_sdpa_forward_decode(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                encoder_lens,
                scaling=scaling,
                sliding_window_size=sliding_window_size,
                **flags,
            )
        longest = int(seq_lens.max())
        slots = req_to_token[req_pool_indices, :longest].long()
        valid = torch.arange(longest) < seq_lens[:, None]
        slots = slots.masked_fill(~valid, 0)
        output.copy_(_attend_one(query, k_cache[slots], v_cache[slots], valid, scaling))
        return output

    def _run_sdpa_forward_extend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        sliding_window_size: int | None = None,
        **flags: Any,
    ) -> Tensor:
        if encoder_lens is not None or sliding_window_size is not None or not causal:
            return super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                sliding_window_size=sliding_window_size,
                **flags,
            )
        new_lens = extend_seq_lens.tolist()
        if max(new_lens) == 1:  # further samples of a prompt whose prefix is cached: as in a decode step
            return self._run_sdpa_forward_decode(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, scaling=scaling
            )
        start = 0
        for request, cached, new in zip(req_pool_indices.tolist(), extend_prefix_lens.tolist(), new_lens, strict=True):
            slots = req_to_token[request, : cached + new].long()
            # [tokens, heads, size] -> [1, heads, tokens, size]
            q, k, v = (t.transpose(0, 1)[None] for t in (query[start : start + new], k_cache[slots], v_cache[slots]))
            mask = torch.ones(new, cached + new, dtype=torch.bool).tril(cached) if cached else None
            result = scaled_dot_product_attention(
                q, k.to(q.dtype), v.to(q.dtype), mask, is_causal=mask is None, scale=scaling, enable_gqa=enable_gqa
            )
            output[start : start + new] = result[0].transpose(0, 1)
            start += new
        return output


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor, scale: float | None) -> Tensor:
    """Attention of one query a sequence: query [B, Hq, D], keys and values [B, L, Hkv, D], valid bool [B, L] -> [B, Hq, D].

    The query heads of a group stand in the place of query positions, so that grouped-query attention needs no copy.
    """
    batch, heads, size = query.shape
    kv_heads = keys.shape[2]
    result = scaled_dot_product_attention(
        query.view(batch, kv_heads, heads // kv_heads, size),
        keys.transpose(1, 2).to(query.dtype),
        values.transpose(1, 2).to(query.dtype),
        valid[:, None, None, :],
        scale=scale,
    )
    return result.reshape(batch, heads, values.shape[-1])
