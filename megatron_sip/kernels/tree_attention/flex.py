"""Prefix-tree attention on a GPU: FlexAttention with a block mask built once per row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_sip.kernels.tree_attention.dense import TokenSpans, token_spans

BLOCK = 128
"""Queries and keys of a block of the mask, FlexAttention's own default."""
ROWS_KEPT = 64
"""Rows that a cache holds; masks of 16,384 tokens take half a megabyte each, beside the row's buffer, of which
the layout that is kept is a view."""


def tree_block_mask(spans: TokenSpans) -> BlockMask:
    """The block mask of a row with these spans, on their device; blocks outside the trees are skipped.

    Padding sees itself alone, so that no row of scores is empty. Which keys of a block a query sees is counted from its spans,
    so that nothing of size [S, S] is made, as torch's `create_block_mask` does.
    """
    length = len(spans.inside)
    blocks = -(-length // BLOCK)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_group = (key <= query) & (key >= spans.group_start[query])
        return in_group & ((key < spans.prefix_end[query]) | (key >= spans.branch_start[query]))

    seen = torch.nn.functional.pad(_seen_keys(spans, blocks), (0, 0, 0, blocks * BLOCK - length))
    counts = seen.unflatten(0, (blocks, BLOCK)).sum(dim=1)
    whole = counts == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_in_order((counts > 0) & ~whole), *_in_order(whole), BLOCK, visible, seq_lengths=(length, length)
    )


def _seen_keys(spans: TokenSpans, blocks: int) -> Tensor:
    """int32 [S, blocks]: how many keys of each block a query sees."""
    after = torch.arange(1, len(spans.inside) + 1, device=spans.inside.device, dtype=torch.int32)
    first = torch.arange(blocks, device=after.device, dtype=torch.int32) * BLOCK
    in_branch = spans.branch_start != spans.group_start

    def overlap(start: Tensor, end: Tensor) -> Tensor:
        return (end[:, None].minimum(first + BLOCK) - start[:, None].maximum(first)).clamp(min=0)

    prefix = overlap(spans.group_start, spans.prefix_end.where(in_branch, spans.group_start))
    return prefix + overlap(spans.branch_start, after)


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(int32 [1, 1, Q], int32 [1, 1, Q, K]): how many of each row of bool [Q, K] are true, and where, these first."""
    places = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], places[None, None]


class RowCache[T]:
    """What attention makes of the last rows' layouts, each once: all layers, policy and reference, recomputation too, share it.

    build: called with a row's layout and length. A row is known by its layout's memory, which is kept alive and cannot be
    another tensor's meanwhile: recomputation passes detached views of the same tensor.
    """

    def __init__(self, build: Callable[[Tensor, int], T], most: int = ROWS_KEPT) -> None:
        self._build = build
        self._most = most
        self._rows: dict[tuple[int, int, int, int], tuple[Tensor, T]] = {}

    def of(self, layout: Tensor, length: int) -> T:
        """What `build` gives for the row."""
        key = (layout.data_ptr(), layout.shape[0], layout._version, length)
        row = self._rows.pop(key, None) or (layout, self._build(layout, length))
        self._rows[key] = row  # the last one used is the last one to go
        if len(self._rows) > self._most:
            del self._rows[next(iter(self._rows))]
        return row[1]


def row_mask(layout: Tensor, length: int) -> tuple[BlockMask, Tensor]:
    """The row's block mask, and bool [S, 1, 1]: which tokens are in a tree."""
    spans = token_spans(layout, length)
    return tree_block_mask(spans), spans.inside[:, None, None]


MASKS = RowCache(row_mask)


class FlexTreeAttention:
    """Attention within a row's trees; arguments and result as `tree_attention_dense`.

    backend: torch.compile's; None does not compile and computes every score: for tests.
    """

    def __init__(self, backend: str | None = "inductor", masks: RowCache[tuple[BlockMask, Tensor]] = MASKS) -> None:
        self._backend = backend
        self._masks = masks

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
        mask, inside = self._masks.of(layout, query.shape[0])
        output = self._attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1) * inside

    @cached_property
    def _attention(self) -> Any:
        """Made when it is first called: a model that never does (on a CPU) need not import torch's compiler (seconds).

        Row lengths vary from step to step: a graph for each would run into dynamo's limit, and then everything is eager.
        """
        if self._backend is None:
            return flex_attention
        return torch.compile(flex_attention, backend=self._backend, dynamic=True)
