"""What most of several votes say (paper section 3.3: safety)."""

from __future__ import annotations

SAFETY = "safety"
"""The criterion whose verdicts are put to the vote."""


def majority(votes: list[float]) -> float:
    """1 if more votes are above a half than below, 0 if fewer are; 0.5: a tie."""
    for_it, against = (sum(sign * (vote - 0.5) > 0 for vote in votes) for sign in (1, -1))
    return 0.5 if for_it == against else float(for_it > against)
