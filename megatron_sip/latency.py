"""Latency percentiles in constant memory: a histogram with logarithmic buckets."""

from __future__ import annotations

import math

_LOWEST_S = 1e-4
_BUCKETS_PER_DOUBLING = 8
_BUCKETS = 24 * _BUCKETS_PER_DOUBLING  # up to about half an hour


class LatencyHistogram:
    """Counts durations from 0.1 ms up; percentiles are exact to 9 % (one bucket)."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.total = 0

    def add(self, seconds: float) -> None:
        place = int(math.log2(seconds / _LOWEST_S) * _BUCKETS_PER_DOUBLING) if seconds > _LOWEST_S else 0
        self._counts[min(place, _BUCKETS - 1)] += 1
        self.total += 1

    def percentile(self, share: float) -> float:
        """Upper edge, in seconds, of the bucket that holds the `share` quantile; 0 when nothing was counted."""
        seen, wanted = 0, share * self.total
        for place, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return _LOWEST_S * 2 ** ((place + 1) / _BUCKETS_PER_DOUBLING)
        return 0.0
