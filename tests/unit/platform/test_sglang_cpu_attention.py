"""Batched attention over a paged KV cache against a float64 loop over sequences, heads and queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sip.platform.sglang_cpu_attention import decode_attention, extend_attention

SLOTS, CONTEXT, KV_HEADS, SIZE = 400, 60, 2, 16


def case(lens: list[int], new: list[int], heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random query and caches, and a table of distinct slots whose unused entries point outside of the cache."""
    generator = torch.Generator().manual_seed(len(lens) + heads)
    query = torch.randn(sum(new), heads, SIZE, generator=generator).to(dtype)
    k_cache, v_cache = (torch.randn(SLOTS, KV_HEADS, SIZE, generator=generator).to(dtype) for _ in range(2))
    table = torch.full((len(lens) + 2, CONTEXT), 10**6, dtype=torch.int32)
    slots = torch.randperm(SLOTS, generator=generator).int()
    requests = torch.randperm(len(lens) + 2, generator=generator)[: len(lens)]
    used = 0
    for request, length in zip(requests.tolist(), lens, strict=True):
        table[request, :length] = slots[used : used + length]
        used += length
    return query, k_cache, v_cache, table, requests, torch.tensor(lens)


def reference(inputs: tuple[Tensor, ...], new: list[int], scale: float) -> Tensor:
    query, k_cache, v_cache, table, requests, lens = inputs
    output = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // KV_HEADS
    row = 0
    for request, length, count in zip(requests.tolist(), lens.tolist(), new, strict=True):
        for position in range(length - count, length):
            slots = table[request, : position + 1].long()
            for head in range(query.shape[1]):
                keys, values = (cache[slots, head // group].double() for cache in (k_cache, v_cache))
                weights = (keys @ query[row, head].double() * scale).softmax(0)
                output[row, head] = weights @ values
            row += 1
    return output


@pytest.mark.parametrize("heads", [2, 6], ids=["one query head a KV head", "three"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("lens", [[1], [7, 50, 1, 23]], ids=str)
def test_decode_attention(lens: list[int], dtype: torch.dtype, tolerance: float, heads: int) -> None:
    inputs = case(lens, [1] * len(lens), heads, dtype)
    output = decode_attention(inputs[0], torch.empty_like(inputs[0]), *inputs[1:], scaling=0.3)
    torch.testing.assert_close(output.double(), reference(inputs, [1] * len(lens), 0.3), rtol=0, atol=tolerance)


@pytest.mark.parametrize("heads", [2, 6], ids=["one query head a KV head", "three"])
@pytest.mark.parametrize(
    ("lens", "new"),
    [([5, 9], [5, 9]), ([5, 30, 12], [2, 30, 1]), ([20, 31, 3], [1, 1, 1])],
    ids=["nothing cached", "some cached", "one new token each"],
)
def test_extend_attention(lens: list[int], new: list[int], heads: int) -> None:
    inputs = case(lens, new, heads, torch.float32)
    new_lens = torch.tensor(new)
    output = torch.empty_like(inputs[0])
    extend_attention(inputs[0], output, *inputs[1:], inputs[-1] - new_lens, new_lens, scaling=0.25)
    torch.testing.assert_close(output.double(), reference(inputs, new, 0.25), rtol=0, atol=1e-6)
