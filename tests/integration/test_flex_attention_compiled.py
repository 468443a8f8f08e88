"""Compiled FlexAttention over prefix trees, as a GPU runs it: on a CPU torch compiles its forward, not its backward."""

from __future__ import annotations

import torch

from megatron_sip.kernels.tree_attention.dense import tree_attention_dense
from megatron_sip.kernels.tree_attention.flex import FlexTreeAttention


def layout_of(prefix: int, branches: int, length: int) -> torch.Tensor:
    starts = [prefix + branch * length for branch in range(branches)]
    return torch.tensor([[0, prefix, start, start + length] for start in starts], dtype=torch.int32)


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True)  # instead of running eagerly
def test_rows_of_any_length_share_a_few_graphs() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    attention = FlexTreeAttention()
    generator = torch.Generator().manual_seed(0)
    for prefix, branches, length, padding in (
        (70, 3, 33, 5),
        (200, 2, 64, 0),
        (31, 5, 17, 9),
        (500, 2, 90, 11),
        (3, 1, 1, 0),
        (128, 2, 64, 128),
        (257, 16, 12, 1),
    ):
        row = prefix + branches * length + padding
        query, key, value = (torch.randn(row, heads, 32, generator=generator) for heads in (4, 2, 2))
        inputs = (query, key, value, layout_of(prefix, branches, length), 0.3)
        assert (attention(*inputs) - tree_attention_dense(*inputs)).abs().max() < 1e-5, row
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
