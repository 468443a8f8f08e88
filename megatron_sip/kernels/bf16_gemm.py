"""Products of bfloat16 matrices that end in float32, on CPU (csrc/cpu/bf16_layers_cpu.cpp, bf16_products.cpp).

They go through tile registers (AMX) where the processor has them, else through AVX-512 BF16, which all our bfloat16 kernels
need; where `bf16_kernels_apply` says no, callers take torch's way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sip.kernels.extension import processor_runs

KERNELS_USABLE = processor_runs("bf16_layers")
WIDTH_MULTIPLE = 16
GRADIENT_ROWS_MULTIPLE = 32
"""The rows of a weight whose gradient is added up are."""


def bf16_kernels_apply(weight: Tensor, width: int) -> bool:
    """Can the kernels work with this weight (or these activations) where the last dimension is (twice) `width`?"""
    return (
        KERNELS_USABLE
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and width % WIDTH_MULTIPLE == 0
    )


def bf16_gemm(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [T, H] times weight [V, H] transposed, bfloat16 in, float32 [T, V] out; not differentiable by itself."""
    return torch.ops.megatron_sip.float_product(hidden, weight)


def add_weight_gradient(main_grad: Tensor, grad_output: Tensor, hidden: Tensor) -> None:
    """main_grad [N, K] += grad_output [T, N] transposed times hidden [T, K], on CPU; not rounded on the way."""
    rows, columns = main_grad.shape
    if (
        bf16_kernels_apply(hidden, columns)
        and grad_output.dtype == torch.bfloat16
        and main_grad.dtype == torch.float32
        and rows % GRADIENT_ROWS_MULTIPLE == 0
    ):
        torch.ops.megatron_sip.add_weight_gradient_(main_grad, grad_output, hidden)
    else:
        wide = torch.promote_types(main_grad.dtype, torch.float32)
        left, right = grad_output.t().to(wide), hidden.to(wide)
        if main_grad.dtype == wide:
            main_grad.addmm_(left, right)
        else:
            main_grad.add_(left @ right)


if KERNELS_USABLE:

    @torch.library.register_fake("megatron_sip::float_product")
    def _fake_float_product(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)

    @torch.library.register_fake("megatron_sip::add_weight_gradient_")
    def _fake_add_weight_gradient(main_grad: Tensor, grad_output: Tensor, hidden: Tensor) -> None:
        return None
