"""The number format that this machine computes in."""

from __future__ import annotations

import platform

import torch


def bfloat16_pays() -> bool:
    """Whether to compute in bfloat16: on a GPU and on processors with AVX-512 BF16 (on Arm: with bfloat16 instructions).

    Elsewhere torch multiplies bfloat16 far slower than float32 (GFLOP/s per core, 640 rows: 2 to 12 with AVX2, 27 with AVX-512
    alone; float32 50 to 120): trainer and servers compute in float32 there, whatever --bf16 and the model's config say.
    ATEN_CPU_CAPABILITY, and ONEDNN_MAX_CPU_ISA below AVX-512, bound what the processor counts as having.
    """
    if torch.cuda.is_available():
        return True
    multiplies = platform.machine() not in ("x86_64", "AMD64") or (
        torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu.get_capabilities()["avx512_bf16"]
    )
    return multiplies and torch.ops.mkldnn._is_mkldnn_bf16_supported()
