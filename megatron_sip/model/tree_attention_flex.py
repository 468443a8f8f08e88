"""Prefix-tree attention on a GPU: FlexAttention with a block mask built once per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megatron_sip.model.tree_attention_dense import token_spans


def tree_block_mask(layout: Tensor, length: int) -> BlockMask:
    """The block mask of a row of `length` tokens, on the layout's device; blocks outside the trees are skipped.

    layout: int32 [B, 4]. Padding sees itself alone, so that no row of scores is empty.
    """
    spans = token_spans(layout, length)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_group = (key <= query) & (key >= spans.group_start[query])
        return in_group & ((key < spans.prefix_end[query]) | (key >= spans.branch_start[query]))

    return create_block_mask(visible, None, None, length, length, device=layout.device)


class FlexTreeAttention:
    """Attention within a row's trees; arguments and result as `tree_attention_dense`.

    One object serves all layers of a model and keeps the last row's block mask, so that a row's mask is built once a
    forward pass and once a backward pass that recomputes. The mask is known by its layout's memory, which is kept alive
    with it and cannot be another tensor's meanwhile: recomputation passes detached views of the same tensor.

    compiled: False runs the eager form, which computes every score: for tests.
    """

    def __init__(self, compiled: bool = True) -> None:
        # Row lengths vary from step to step: a graph for each would run into dynamo's limit, and then everything is eager.
        self._attention: Any = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
        self._layout: Tensor | None = None
        self._key: tuple[int, int, int, int] | None = None
        self._mask: BlockMask | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
        output = self._attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            block_mask=self._block_mask(layout, query.shape[0]),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        inside = token_spans(layout, query.shape[0]).inside
        return output[0].transpose(0, 1) * inside[:, None, None]

    def _block_mask(self, layout: Tensor, length: int) -> BlockMask:
        key = (layout.data_ptr(), layout.shape[0], layout._version, length)
        if self._mask is None or key != self._key:
            self._layout, self._key, self._mask = layout, key, tree_block_mask(layout, length)
        return self._mask
