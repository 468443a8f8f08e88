"""Step metrics, and how they add up over rows and ranks.

A metric is a plain float (a count, adds up), a `Mean` (adds up as total and count) or, under `seconds/`, a duration of
which ranks report the longest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean kept as its total and its weight, so that parts can be merged exactly."""

    total: float
    weight: float = 1.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """The mean; NaN without weight."""
        return self.total / self.weight if self.weight else math.nan


Metrics = dict[str, "float | Mean"]


def merge(parts: Iterable[Mapping[str, float | Mean]]) -> Metrics:
    """Add up the metrics of several rows or ranks; `seconds/*` keeps the longest."""
    merged: Metrics = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
                continue
            present = merged[name]
            if isinstance(value, Mean) and isinstance(present, Mean):
                merged[name] = present + value
            elif isinstance(value, Mean) or isinstance(present, Mean):
                raise TypeError(f"metric {name} is a mean in one part and a plain number in another")
            else:
                merged[name] = max(present, value) if name.startswith("seconds/") else present + value
    return merged


def flatten(metrics: Mapping[str, float | Mean]) -> dict[str, float]:
    """Plain numbers for writers; means without weight (nothing was measured) and what is not finite, as the loss of a step that
    was skipped for it, are left out: JSON has no word for them."""
    plain = {name: value.value if isinstance(value, Mean) else float(value) for name, value in metrics.items()}
    return {name: value for name, value in plain.items() if math.isfinite(value)}
