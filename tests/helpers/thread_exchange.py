"""Ranks of a trainer that are threads."""

from __future__ import annotations

import threading
from typing import Any


class ThreadExchange:
    """all_gather_object among `size` threads: each calls it with its index and its value."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size

    def __call__(self, index: int, value: Any) -> list[Any]:
        self._values[index] = value
        self._barrier.wait(60)
        gathered = list(self._values)
        self._barrier.wait(60)
        return gathered
