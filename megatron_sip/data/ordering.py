"""Seeded orders with random access: hashes, shuffles that are never materialised, and the blend of several sources.

Everything here is a pure function of its arguments, so any rank can compute the n-th element of an epoch or of a blend
without the ones before it, and a resumed run needs no state but its number of consumed tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
import numpy.typing as npt

_MASK64 = (1 << 64) - 1
_ROUNDS = 6
MAX_BLEND_PERIOD = 1 << 16


def mix64(value: Any) -> Any:  # int -> int, or uint64 array -> uint64 array
    """SplitMix64's output function: a bijection of 64-bit numbers whose every output bit depends on every input bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def hash64(*parts: int) -> int:
    """A well mixed 64-bit hash of a tuple of integers (same on every machine and Python, unlike `hash`)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = mix64((state + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64)
    return state


def uniform_below(bound: int, *parts: int) -> int:
    """A number in [0, bound), uniform over the hashes of `parts` (bias below bound / 2**64)."""
    return (hash64(*parts) * bound) >> 64


@dataclass(frozen=True, slots=True)
class Permutation:
    """A seeded bijection of range(size) that takes no memory: a Feistel network with cycle walking.

    `permutation(i)` takes one int, `permutation.take(array)` many. The network permutes the next power of four above
    `size`; an output outside the range is fed in again, which ends after less than four rounds on average.
    """

    size: int
    seed: int

    def _half_bits(self) -> int:
        return max(1, ((self.size - 1).bit_length() + 1) // 2)

    def _keys(self) -> list[int]:
        return [hash64(self.seed, self.size, i) for i in range(_ROUNDS)]

    def __call__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside a permutation of {self.size}")
        half, keys = self._half_bits(), self._keys()
        value = _feistel(position, half, keys)
        while value >= self.size:
            value = _feistel(value, half, keys)
        return value

    def take(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The images of an int64 array of positions in [0, size), as int64."""
        half, keys = self._half_bits(), self._keys()
        values = _feistel(positions.astype(np.uint64), half, keys)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = _feistel(values[outside], half, keys)
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)


def _feistel(value: Any, half: int, keys: list[int]) -> Any:  # int or uint64 array, like mix64
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half) | right


@dataclass(frozen=True, slots=True)
class Blend:
    """Which source the n-th task comes from, and how many tasks that source gave before.

    `period` holds the source of each task of one period, `ranks` its number among that source's tasks in the period and
    `counts` the tasks of each source a period. After any number of tasks, each source's count differs from its exact
    share by less than 1 (`weights` are the shares used, which sum to 1).
    """

    weights: tuple[Fraction, ...]
    period: npt.NDArray[np.int32]
    ranks: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, number of earlier tasks of that source) of task `index`."""
        cycle, offset = divmod(index, len(self.period))
        source = int(self.period[offset])
        return source, cycle * int(self.counts[source]) + int(self.ranks[offset])

    def count_before(self, index: int) -> list[int]:
        """Tasks of each source among the first `index`."""
        cycle, offset = divmod(index, len(self.period))
        partial = np.bincount(self.period[:offset], minlength=len(self.counts))
        return [int(cycle * whole + part) for whole, part in zip(self.counts, partial, strict=True)]


def make_blend(weights: Sequence[Fraction]) -> Blend:
    """The blend of sources in proportion to positive `weights`.

    Weights with a common denominator up to 65,536 (any sane decimals) are used exactly, others rounded to it. Order by
    Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980), which keeps every source
    within 1 - 1/(2k - 2) of its share; greedy largest-deficit orders do not.
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"blend weights must be positive, got {[str(w) for w in weights]}")
    parts = _integer_weights(weights)
    total, k = sum(parts), len(parts)
    if k == 1:
        return Blend((Fraction(1),), np.zeros(1, np.int32), np.zeros(1, np.int64), np.ones(1, np.int64))
    share = np.asarray(parts, np.int64)
    slack = 2 * k - 2
    counts = np.zeros(k, np.int64)
    period, ranks = np.empty(total, np.int32), np.empty(total, np.int64)
    for step in range(total):
        deficit = share * (step + 1) - counts * total  # in units of 1 / total of a task
        urgency = (total * (slack - 1) - deficit * slack) / share  # steps until the source would fall too far behind
        source = int(np.argmin(np.where(deficit * slack >= total, urgency, np.inf)))
        period[step], ranks[step] = source, counts[source]
        counts[source] += 1
    return Blend(tuple(Fraction(part, total) for part in parts), period, ranks, counts)


def _integer_weights(weights: Sequence[Fraction]) -> list[int]:
    """Integers in the ratio of `weights`, exact when they sum to at most MAX_BLEND_PERIOD, otherwise rounded."""
    denominator = lcm(*(w.denominator for w in weights))
    parts = [int(w * denominator) for w in weights]
    divisor = gcd(*parts)
    parts = [part // divisor for part in parts]
    total = sum(parts)
    if total > MAX_BLEND_PERIOD:
        parts = [max(1, round(part * MAX_BLEND_PERIOD / total)) for part in parts]
    return parts
