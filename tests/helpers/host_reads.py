"""Counts what a host must wait for: values that Python asks a device for, and shapes that depend on values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_dim",
    "_unique2",
}
MASKS = (torch.bool, torch.uint8)


class HostReads(TorchDispatchMode):
    """`reads`: by operator. `copies`: between devices, as (from, to)."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.copies: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]  # type: ignore[attr-defined]
        if name in WAITING or (name in ("index", "index_put", "index_put_") and has_mask(args[1])):
            self.reads[name] += 1
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.reads[name] += 1
        result = func(*args, **kwargs)
        ends = (args[1], args[0]) if name == "copy_" else (args[0], result) if name == "_to_copy" else ()
        places = tuple(end.device.type for end in ends)
        if len(set(places)) > 1:
            self.copies.append(places)  # type: ignore[arg-type]
        return result


def has_mask(indices: Iterable[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype in MASKS for index in indices)
