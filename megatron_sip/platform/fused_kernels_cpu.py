"""Gives Megatron CPU implementations of fused kernels: rotary embedding, adding up weight gradients, norms, clipping.

Megatron takes the first from Transformer Engine and the others from Apex. Ours are one pass over memory where torch takes
several, and do not round a gradient to bfloat16 before it is added to the float32 sum. Where the compiled kernels do not
apply (another dtype or processor) torch computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_sip.kernels.bf16_gemm import add_weight_gradient, bf16_kernels_apply
from megatron_sip.kernels.bf16_layers import HEAD_MULTIPLE, rotate


def offer_fused_kernels() -> None:
    """Put them into the places where Megatron looks for them."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    rope_utils.fused_apply_rotary_pos_emb = apply_rotary
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate_weight_gradient, wgrad_gemm_accum_fp16=accumulate_weight_gradient
    )
    layers._grad_accum_fusion_available = True
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = scale_tensors
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm


def apply_rotary(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of heads t [S, B, H, D] by angles freqs [S, 1, 1, D], as Transformer Engine's function of that name."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    tokens, batch, _, dim = t.shape
    whole_heads = freqs.shape == (tokens, 1, 1, dim) and dim % HEAD_MULTIPLE == 0
    if batch == 1 and whole_heads and not interleaved and bf16_kernels_apply(t, dim):
        return rotate(t[:, 0], freqs[:, 0, 0, : dim // 2])[:, None]  # the second half repeats the first
    return _apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)


def accumulate_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [N, K] += grad_output [T, N] transposed times total_input [T, K], as Apex's `wgrad_gemm_accum_*`."""
    add_weight_gradient(main_grad, grad_output, total_input)


def scale_tensors(chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float) -> None:
    """Each second list's tensor = the first list's times `scale`, as Apex's `multi_tensor_scale`, without a copy between."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, None]:
    """The norm [1] of all tensors together, as Apex's `multi_tensor_l2norm`, of squares added up in float64.

    Torch's norm on a CPU adds float32 squares up one after the other: over an embedding of 28 million entries it is wrong by
    2e-3, and otherwise for each way in which ranks share the entries.
    """
    total = torch.zeros(1, dtype=torch.float64)
    for tensor in chain.from_iterable(tensor_lists):
        for chunk in tensor.detach().reshape(-1).split(chunk_size):
            exact = chunk.double()
            total += exact.dot(exact)
    return total.sqrt().float(), None
