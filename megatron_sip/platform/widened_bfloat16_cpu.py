"""bfloat16 products and attention by way of float32 on a processor without bfloat16 instructions (AVX2 alone: most laptops).

There torch multiplies bfloat16 up to 40 times slower than float32 (`csrc/cpu/widened_bfloat16.h`). Products that are written
`out=` or in place, other than `torch.mm(..., out=...)`, stay torch's.
"""

from __future__ import annotations

import functools

import torch

from megatron_sip.model.logprob_ops import extension


def multiplies_bfloat16() -> bool:
    """False where torch's bfloat16 products are slow: no GPU, and no AVX-512 (on Arm: no bfloat16 instructions)."""
    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def offer_widened_bfloat16() -> object | None:
    """Let torch's dispatcher take our kernels, where they are faster and built, for the life of the process."""
    if multiplies_bfloat16() or extension is None:
        return None
    return extension.WidenedBFloat16()  # kept by the cache: they are torch's again when it goes
