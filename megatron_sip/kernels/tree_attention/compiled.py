"""Exact prefix-tree attention in bfloat16 on CPU by compiled kernels (csrc/cpu/tree_attention_*.cpp).

One pass over blocks of 64 queries, each on just the keys it may see. torch's own CPU flash attention does not use bfloat16
dot products in its backward; these kernels do, for both passes, and keep everything but the operands in float32. They need
a processor with AVX-512 BF16; without one, or without the built extension, `tree_attention_cpu` takes torch's way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sip.kernels.extension import processor_runs

HEAD_DIM_MULTIPLE = 16


KERNELS_USABLE = processor_runs("tree_attention")


def compiled_kernels_apply(query: Tensor) -> bool:
    """Can `tree_attention_compiled` attend with these queries [S, H, D] on this machine?"""
    return KERNELS_USABLE and query.dtype == torch.bfloat16 and query.shape[2] % HEAD_DIM_MULTIPLE == 0


def tree_attention_compiled(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
    """Attention within a row's trees; arguments and result as `tree_attention_dense`, in bfloat16, differentiable once.

    Raises:
        ValueError: shapes or a layout that do not fit (named). TypeError: inputs that are not bfloat16.
    """
    return _CompiledTreeAttention.apply(query, key, value, layout, scale)


class _CompiledTreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
        output, lse = torch.ops.megatron_sip.tree_attention(query, key, value, layout, scale)
        ctx.save_for_backward(query, key, value, output, lse, layout)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grads = torch.ops.megatron_sip.tree_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale)
        return (*grads, None, None)


if KERNELS_USABLE:

    @torch.library.register_fake("megatron_sip::tree_attention")
    def _fake_forward(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)

    @torch.library.register_fake("megatron_sip::tree_attention_backward")
    def _fake_backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, layout: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
