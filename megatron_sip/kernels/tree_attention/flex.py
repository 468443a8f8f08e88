"""Prefix-tree attention on a GPU: FlexAttention with a block mask built once per row."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_sip.kernels.tree_attention.dense import TokenSpans, token_spans


def tree_block_mask(spans: TokenSpans) -> BlockMask:
    """The block mask of a row with these spans, on their device; blocks outside the trees are skipped.

    Padding sees itself alone, so that no row of scores is empty.
    """
    length = len(spans.inside)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_group = (key <= query) & (key >= spans.group_start[query])
        return in_group & ((key < spans.prefix_end[query]) | (key >= spans.branch_start[query]))

    return create_block_mask(visible, None, None, length, length, device=spans.inside.device)


class FlexTreeAttention:
    """Attention within a row's trees; arguments and result as `tree_attention_dense`.

    One object serves all layers of a model and keeps the last row's block mask, so that a row's mask is built once per
    forward pass and once per backward pass that recomputes. The mask is known by its layout's memory, which is kept alive
    with it and cannot be another tensor's meanwhile: recomputation passes detached views of the same tensor.

    compiled: False runs the eager form, which computes every score: for tests.
    """

    def __init__(self, compiled: bool = True) -> None:
        self._compiled = compiled
        self._layout: Tensor | None = None
        self._key: tuple[int, int, int, int] | None = None
        self._row: tuple[BlockMask, Tensor] | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
        mask, inside = self._mask_of(layout, query.shape[0])
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
        return torch.compile(flex_attention, dynamic=True) if self._compiled else flex_attention

    def _mask_of(self, layout: Tensor, length: int) -> tuple[BlockMask, Tensor]:
        """The row's block mask, and bool [S, 1, 1]: which tokens are in a tree."""
        key = (layout.data_ptr(), layout.shape[0], layout._version, length)
        if self._row is None or key != self._key:
            spans = token_spans(layout, length)
            self._layout, self._key, self._row = layout, key, (tree_block_mask(spans), spans.inside[:, None, None])
        return self._row
