"""bfloat16 products and attention by way of float32, for a processor without bfloat16 instructions (AVX2 alone: most laptops).

There torch multiplies bfloat16 number by number: 2 GFLOP/s in the gradient of a layer's input where the float32 product
runs at 70. Widening all factors first costs little, and sums are float32 either way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

NUMBERS_A_BLOCK = 2**20
"""So much of a product's right side is held in float32 at a time, 4 MiB: it is still in cache when it is multiplied."""

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def multiplies_bfloat16() -> bool:
    """False where torch's bfloat16 products are slow: no GPU, and no AVX-512 (on Arm: no bfloat16 instructions)."""
    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def offer_widened_bfloat16() -> Library | None:
    """Let torch compute bfloat16 on CPU as this module does, where that is faster; for the life of the process."""
    if multiplies_bfloat16():
        return None
    library = Library("aten", "IMPL")
    register_widened(library)
    return library  # kept by the cache: torch forgets what a library registered when it goes


def register_widened(library: Library) -> None:
    """Register products and attention with the dispatcher; what is not bfloat16 or does not fit goes torch's way."""
    for name in ("mm", "mm.out", "bmm"):
        _register(library, name, multiply, _is_product)
    for name in ("addmm", "baddbmm"):
        _register(library, name, multiply_and_add, _is_product)
    _register(library, _attention.__name__, attend, _is_attention)
    _register(library, _attention_backward.__name__, attend_backward, _is_attention)


def _register(library: Library, name: str, ours: Callable[..., Any], applies: Callable[..., bool]) -> None:
    stock = get_kernel(f"aten::{name}", "CPU")

    def choose(keys: torch.DispatchKeySet, *arguments: Any, **options: Any) -> Any:
        if applies(*arguments, **options):
            return ours(*arguments, **options)
        return stock.call_boxed(keys, *arguments, **options)

    library.impl(name, choose, "CPU", with_keyset=True)


def _is_product(*tensors: Tensor, out: Tensor | None = None, **_options: Any) -> bool:
    """Are they ([bias,] left, right) in bfloat16 that fit? One row alone torch multiplies as fast as it reads."""
    left, right = tensors[-2:]
    return (
        all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        and left.dim() == right.dim() >= 2
        and left.shape[:-2] == right.shape[:-2]
        and left.shape[-1] == right.shape[-2]
        and left.shape[-2] > 1
        and (out is None or (out.dtype == torch.bfloat16 and out.shape == (*left.shape[:-1], right.shape[-1])))
    )


def _is_attention(*arguments: Any, **_options: Any) -> bool:
    """Are (query, key, value), with (gradient of the output) before them in backward, all bfloat16?"""
    return all(tensor.dtype == torch.bfloat16 for tensor in arguments[:3])


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [(B,) M, K] times right [(B,) K, N] in bfloat16, summed in float32 and rounded once; into `out` if given."""
    if out is None:
        out = left.new_empty((*left.shape[:-1], right.shape[-1]))
    wide = left.float()
    blocks = max(1, math.ceil(right.numel() / NUMBERS_A_BLOCK))
    for columns, right_columns in zip(out.chunk(blocks, -1), right.chunk(blocks, -1), strict=True):
        columns.copy_(wide @ right_columns.float())
    return out


def multiply_and_add(bias: Tensor, left: Tensor, right: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * bias + alpha * left times right, rounded once; a `beta` of 0 ignores what `bias` holds."""
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    return add(bias.float(), left.float(), right.float(), beta=beta, alpha=alpha).bfloat16()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's flash attention: bfloat16 [B, H, S, D] three times -> the same and log-sum-exps, float32 [B, H, S]."""
    output, logsumexp = _attention(
        query.float(), key.float(), value.float(), dropout_p, is_causal, attn_mask=_wide(attn_mask), scale=scale
    )
    return output.bfloat16(), logsumexp


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `attend`'s query, key and value, in bfloat16."""
    inputs = [tensor.float() for tensor in (grad_out, query, key, value, out)]
    grads = _attention_backward(*inputs, logsumexp, dropout_p, is_causal, attn_mask=_wide(attn_mask), scale=scale)
    return tuple(grad.bfloat16() for grad in grads)


def _wide(mask: Tensor | None) -> Tensor | None:
    """Masks of numbers are in the query's dtype, others boolean."""
    return mask.float() if mask is not None and mask.dtype == torch.bfloat16 else mask
