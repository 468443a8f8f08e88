"""The token embedding with its gradient added to the few rows that were looked up.

Autograd makes a gradient as large as the whole table for every micro-batch, which then is added to Megatron's float32
`main_grad`: four passes over the vocabulary for some thousand rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def embed_into_main_grad(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows of weight [V, H] for tokens int64 [S] -> [S, H]. Backward adds to `weight.main_grad`, autograd gets nothing."""
    return _EmbedIntoMainGrad.apply(weight, tokens)


class _EmbedIntoMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.main_grad = weight.main_grad  # type: ignore[attr-defined]
        ctx.save_for_backward(tokens)
        return weight.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        (tokens,) = ctx.saved_tensors
        ctx.main_grad.index_add_(0, tokens, grad.to(ctx.main_grad.dtype))
        return None, None
