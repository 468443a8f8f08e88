"""What this machine computes fast, where a default depends on it."""

from __future__ import annotations

import torch


def multiplies_bfloat16() -> bool:
    """False on a machine without a GPU whose processor lacks AVX-512 (on Arm: bfloat16 instructions).

    There torch multiplies bfloat16 matrices 10 to 100 times slower than float32 ones.
    """
    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
