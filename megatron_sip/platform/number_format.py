"""The number format that this machine computes in."""

from __future__ import annotations

import platform

import torch


def bfloat16_pays() -> bool:
    """Whether to compute in bfloat16: on a GPU and on processors with AVX-512 (on Arm: with bfloat16 instructions).

    With AVX2 alone (most laptops, many servers) torch multiplies bfloat16 at 2 to 16 GFLOP/s a core and float32 at 50 to 70:
    trainer and servers compute in float32 there, whatever --bf16 and the model's config say.
    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA bound what the processor counts as having.
    """
    if torch.cuda.is_available():
        return True
    narrow = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in (
        "DEFAULT",
        "AVX2",
    )
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not narrow
