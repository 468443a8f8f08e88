"""Packages that are installed but of no use to a process, and take seconds to import."""

from __future__ import annotations

import sys

GPU_KERNELS = ("flash_mla", "flash_attn", "flashinfer")
"""They come with SGLang. Without libcuda the first raises OSError on import, which few catch; the others only take time."""


def hide_packages(*names: str) -> None:
    """Make importing these an ImportError in this process, as if they were not installed; not those already imported."""
    for name in names:
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]
