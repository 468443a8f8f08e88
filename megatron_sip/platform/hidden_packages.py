"""Hides installed packages that are of no use to a process and take seconds to import."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

GPU_KERNELS = ("flash_mla", "flash_attn", "flashinfer")
"""They come with SGLang. Without libcuda the first raises OSError on import, which few catch; the others only take time."""

UNUSED = ("sklearn",)
"""transformers imports it, where it is there, for a way of generation that nobody here takes: a second, and a thread."""


def hide_packages(*names: str) -> None:
    """Make importing these an ImportError in this process, as if they were not installed; not those already imported."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)  # Python's own way to say so is None
    for name in names:
        modules.setdefault(name, None)
