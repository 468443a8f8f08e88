"""Logits in float32 from bf16 or fp16 hidden states and weights.

Logits of magnitude 16 to 32 have a spacing of 0.125 in bf16: rounding them costs 0.03 per token log-prob, which adds up over a
branch and hides what DPO's margin is made of. The products are exact in float32 anyway, so only their sum is kept wider.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sip.kernels.bf16_gemm import add_weight_gradient, bf16_gemm, bf16_kernels_apply

ROWS_A_BLOCK = 1024
"""Rows of logits whose gradient is held in the hidden states' dtype at a time, where it is added to a `main_grad`."""


def fp32_lm_head(hidden: Tensor, weight: Tensor, tp_group: dist.ProcessGroup | None = None) -> Tensor:
    """hidden [T, H] times weight [V/tp, H] transposed, as float32 [T, V/tp] (float64 stays float64).

    The gradient of `hidden` is summed over `tp_group`; both gradients come in the dtypes of their inputs.
    """
    return _Fp32LmHead.apply(hidden, weight, tp_group)


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """`fp32_lm_head` without autograd and on one rank."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not len(hidden):  # a filler row's: no float32 copy of the weight for it
        return hidden.new_empty((0, len(weight)), dtype=wide)
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, weight.T, out_dtype=wide)
    if hidden.dtype == torch.bfloat16 and bf16_kernels_apply(weight, hidden.shape[1]):
        return bf16_gemm(hidden, weight)
    return hidden.to(wide) @ weight.to(wide).T


def shared_main_grad(weight: Tensor) -> Tensor | None:
    """The float32 `main_grad` of a weight whose gradient may be added there at once, or None.

    Megatron hangs `main_grad` on the weights it trains, and `zero_out_wgrad` on one that the embedding shares. Where it
    waits for autograd to complete the gradient (`--overlap-grad-reduce`), the embedding's comes that way.
    """
    main_grad = getattr(weight, "main_grad", None)
    return main_grad if getattr(weight, "zero_out_wgrad", False) and weight.device.type == "cpu" else None


def narrowed_blocks(grad: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of grad [T, V] in `dtype`, in order; the next one overwrites a block. Whole where that is its dtype."""
    if grad.dtype == dtype:
        yield slice(0, len(grad)), grad
        return
    buffer = grad.new_empty((min(ROWS_A_BLOCK, len(grad)), grad.shape[1]), dtype=dtype)
    for first in range(0, len(grad), ROWS_A_BLOCK):
        block = grad[first : first + ROWS_A_BLOCK]
        yield slice(first, first + len(block)), buffer[: len(block)].copy_(block)


class _Fp32LmHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.tp_group = tp_group
        return project(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        main_grad = shared_main_grad(weight) if needs_weight else None
        grad_hidden, grad_weight = None, None
        if main_grad is not None:
            grad_hidden = torch.empty_like(hidden)
            for rows, grad in narrowed_blocks(grad_logits, hidden.dtype):
                torch.mm(grad, weight, out=grad_hidden[rows])
                add_weight_gradient(main_grad, grad, hidden[rows])
        else:  # a sum over blocks would be rounded for each, or need float32 of the weight's size
            grad = grad_logits.to(hidden.dtype)
            grad_hidden = grad @ weight if needs_hidden else None
            grad_weight = grad.T @ hidden if needs_weight else None
        if grad_hidden is not None and ctx.tp_group is not None and ctx.tp_group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.tp_group)
        return grad_hidden, grad_weight, None
