"""What becomes of a step whose loss or gradient is not finite: it is tried again at a lower loss scale, or skipped.

A skipped step leaves parameters and optimizer as they were; schedule and cursor go on, so that no run, and no job that is
started again, dies on the same batch for ever. Several such steps in a row are no accident of a batch: they end the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_OVERFLOWS = 10
"""Passes over the examples of one step in which float16 may overflow before the step is skipped."""
MAX_NON_FINITE_STEPS = 3
"""Skipped steps in a row that end the run."""
NON_FINITE = "non_finite_steps"
"""The metric that counts them."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One pass over a step's examples.

    trouble: what was not finite, None when the parameters were updated; then `grad_norm` is there. scale, next_scale: the
    loss scale of this pass and the one after it; they differ only in float16.
    """

    trouble: str | None
    grad_norm: float | None
    scale: float
    next_scale: float


def worth_another(attempts: Sequence[Attempt]) -> bool:
    """Whether the same examples may do at the lower loss scale that the last attempt led to."""
    last = attempts[-1]
    return last.trouble is not None and last.next_scale < last.scale and len(attempts) < MAX_OVERFLOWS


def in_a_row(before: int, metrics: Mapping[str, object], *, trained: bool) -> int:
    """Non-finite steps in a row after one with these metrics, of `before` until it; a step without examples says nothing."""
    if not trained:
        return before
    return before + 1 if NON_FINITE in metrics else 0


def as_ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, as "3, 7-9"."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
