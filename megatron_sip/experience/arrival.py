"""How long a step's groups take to arrive and to be judged, the one beside the other."""

from __future__ import annotations

import time

from megatron_sip.metrics import Metrics


class ArrivalClock:
    """Started with a step's requests; told of each group that has its candidates, and of each that is judged."""

    def __init__(self) -> None:
        self._begun = self._last_arrival = self._judging_since = time.monotonic()
        self._in_judgement = 0
        self._judging = 0.0

    def arrived(self) -> None:
        """One more group has its candidates."""
        self._last_arrival = time.monotonic()
        if not self._in_judgement:
            self._judging_since = self._last_arrival
        self._in_judgement += 1

    def judged(self, count: int) -> None:
        """So many more are judged."""
        self._in_judgement -= count
        if not self._in_judgement:
            self._judging += time.monotonic() - self._judging_since

    def seconds(self) -> Metrics:
        """At the end of all: seconds/rollout until the last candidate was there, seconds/judge from then on, which is what
        judging adds; seconds/judging in which any group was being judged, most of it beside the rollouts."""
        return {
            "seconds/rollout": self._last_arrival - self._begun,
            "seconds/judge": time.monotonic() - self._last_arrival,
            "seconds/judging": self._judging,
        }
