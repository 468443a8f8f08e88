"""From which step on, and up to which, a kind of candidate takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.records import CandidateKind


@dataclass(frozen=True, slots=True)
class KindSteps:
    """rollout_start: the first step with rollouts. suffix_end, rewrite_end: the first step without them, None: never."""

    rollout_start: int = 0
    suffix_end: int | None = None
    rewrite_end: int | None = None

    def at(self, kinds: Sequence[CandidateKind], step: int) -> tuple[CandidateKind, ...]:
        """Those of `kinds` that are candidates at optimizer step `step` (0 is the first)."""
        ends = {"suffix": self.suffix_end, "rewrite": self.rewrite_end}
        gone = {kind for kind, end in ends.items() if end is not None and step >= end}
        if step < self.rollout_start:
            gone.add("rollout")
        return tuple(kind for kind in kinds if kind not in gone)

    def phases(self) -> list[int]:
        """The steps at which a phase with other kinds may begin, 0 among them, in order."""
        return sorted({0, self.rollout_start, self.suffix_end or 0, self.rewrite_end or 0})


ALWAYS = KindSteps()
