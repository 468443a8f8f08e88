"""Prefix-tree visibility from a row's layout, and attention with it as a dense boolean mask.

The dense form costs a full [S, S] product: it is the reference that the fast paths are tested against, and what runs
where they do not apply.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSpans(NamedTuple):
    """What each token of a row may look back to.

    Token q sees k iff group_start[q] <= k <= q, and k < prefix_end[q] or k >= branch_start[q].

    group_start, prefix_end, branch_start: int32 [S]; a prefix token's branch_start is its group_start; padding has
    all three at its own index, so that it sees itself alone.
    inside: bool [S], False for padding.
    """

    group_start: Tensor
    prefix_end: Tensor
    branch_start: Tensor
    inside: Tensor


def token_spans(layout: Tensor, length: int) -> TokenSpans:
    """Spans of the `length` tokens of a row from its layout (int32 [B, 4], see PackedRow); no device synchronisation.

    Relies on the branches following each other in the row, as PackedRow promises.
    """
    index = torch.arange(length, device=layout.device, dtype=torch.int32)
    if layout.shape[0] == 0:
        # Copies, since compiled attention makes another graph for inputs that are one tensor.
        return TokenSpans(index, index.clone(), index.clone(), torch.zeros_like(index, dtype=torch.bool))
    # The branches follow each other in the row, so the first one that ends after a token is its own or, for a prefix
    # token, the first of its group.
    line = torch.searchsorted(layout[:, 3].contiguous(), index, right=True)
    inside = line < layout.shape[0]
    group_start, prefix_end, branch_start, _ = layout[line.clamp(max=layout.shape[0] - 1)].unbind(1)
    branch_start = torch.where(index < prefix_end, group_start, branch_start)
    return TokenSpans(
        torch.where(inside, group_start, index),
        torch.where(inside, prefix_end, index),
        torch.where(inside, branch_start, index),
        inside,
    )


def visibility(spans: TokenSpans) -> Tensor:
    """bool [S, S]: may token q (row) attend to token k (column)?"""
    key = torch.arange(spans.inside.shape[0], device=spans.inside.device, dtype=torch.int32)
    query = key[:, None]
    in_group = (key <= query) & (key >= spans.group_start[:, None])
    return in_group & ((key < spans.prefix_end[:, None]) | (key >= spans.branch_start[:, None]))


def tree_attention_dense(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
    """Attention within a row's trees.

    Args:
        query: [S, H, D]; key, value: [S, G, D] with H a multiple of G (grouped-query attention).
        layout: int32 [B, 4]; scale: multiplies the scores.

    Returns:
        [S, H, D]; zero, and without gradient, at padding.
    """
    spans = token_spans(layout, query.shape[0])
    output = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=visibility(spans)[None, None],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1) * spans.inside[:, None, None]
