"""Compiled bfloat16 kernels for what a layer does between its matrix products, on CPU (csrc/cpu/bf16_layers_*.cpp).

torch takes RMSNorm, SwiGLU and rotation apart into passes over memory that cost as much as the products. These kernels take
one pass each, keep float32 inside, and save no intermediate result for backward but one number per row. Where
`bf16_kernels_apply` says no, callers take torch's or Megatron's way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sip.kernels.bf16_gemm import KERNELS_USABLE

HEAD_MULTIPLE = 32
"""A rotated head's size is a multiple of it."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, rounded once.

    x [..., H] bfloat16 or float32, weight [H] bfloat16 -> bfloat16.
    """
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of bfloat16 [..., 2 * F], gate first -> [..., F]."""
    return _SwiGLU.apply(gate_up)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding, rounded once: (first half, second half) to (first cos - second sin, second cos + first sin).

    x [S, H, D] bfloat16, angles [S, D / 2] float32 -> [S, H, D]. Needs D a multiple of `HEAD_MULTIPLE`.
    """
    return _Rotate.apply(x, angles.cos(), angles.sin())


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return torch.ops.megatron_sip.rotate(x, cosines, sines, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.megatron_sip.rotate(grad, *ctx.saved_tensors, True), None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()  # kept for backward: a head's norm sees a view of [q | k | v]
        output, inverse_rms = torch.ops.megatron_sip.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = torch.ops.megatron_sip.rms_norm_backward(grad, *ctx.saved_tensors)
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return torch.ops.megatron_sip.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.megatron_sip.swiglu_backward(grad, *ctx.saved_tensors)


if KERNELS_USABLE:

    @torch.library.register_fake("megatron_sip::rms_norm")
    def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, dtype=weight.dtype), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)

    @torch.library.register_fake("megatron_sip::rms_norm_backward")
    def _fake_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight)

    @torch.library.register_fake("megatron_sip::swiglu")
    def _fake_swiglu(gate_up: Tensor) -> Tensor:
        return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))

    @torch.library.register_fake("megatron_sip::swiglu_backward")
    def _fake_swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
        return torch.empty_like(gate_up)

    @torch.library.register_fake("megatron_sip::rotate")
    def _fake_rotate(x: Tensor, cosines: Tensor, sines: Tensor, back: bool) -> Tensor:
        return x.new_empty(x.shape)
