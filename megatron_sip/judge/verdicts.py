"""Verdicts: what counts as a judge's decision, and how it is read from the judge's own output.

A verdict is read from the answer alone, never from the prompt or from a reasoning channel; the last match wins; none is
None, a missing vote. Nothing here turns an error or an unreadable answer into a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Reasoning that some models put in front of their answer when the server does not separate it.
_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_UNFINISHED_THINKING = re.compile(r"<(think|thinking|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(r"\A.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)
_FINAL_CHANNEL = "<|channel|>final<|message|>"
_ANY_CHANNEL = "<|channel|>"

MIN_VERDICT_MASS = 1e-3
"""A soft verdict needs this much probability on the verdict tokens together; with less, the judge did not answer."""


@dataclass(frozen=True, slots=True)
class VerdictRule:
    """How one criterion's verdicts look and what they are worth.

    `pattern` has one group, whose text (case ignored) is a key of `values`. `start` is what a soft verdict forces the
    answer to begin with; the keys of `values` are its possible continuations.
    """

    pattern: re.Pattern[str]
    values: Mapping[str, float]
    start: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.values)

    def parse(self, output: str) -> float | None:
        """The value of the last verdict in a judge's output, None when there is none."""
        matches = self.pattern.findall(own_answer(output))
        if not matches:
            return None
        found = matches[-1].casefold()
        return next((value for label, value in self.values.items() if label.casefold() == found), None)

    def expected_value(self, label_logprobs: Sequence[float]) -> float | None:
        """Probability-weighted value of the labels (natural log-probs in the order of `labels`); None below
        `MIN_VERDICT_MASS`."""
        masses = [math.exp(logprob) for logprob in label_logprobs]
        total = sum(masses)
        if not math.isfinite(total) or total < MIN_VERDICT_MASS:
            return None
        return sum(mass * value for mass, value in zip(masses, self.values.values(), strict=True)) / total


def own_answer(output: str) -> str:
    """The part of a judge's output that is its answer: reasoning is cut off, also when it was never finished."""
    if _ANY_CHANNEL in output:
        return output.rpartition(_FINAL_CHANNEL)[2] if _FINAL_CHANNEL in output else ""
    output = _THINKING.sub("", output)
    output = _THINKING_END.sub("", output)  # some templates open the reasoning inside the prompt
    return _UNFINISHED_THINKING.sub("", output)


def unanimous(votes: Sequence[float | None], count: int = 8) -> float | None:
    """The common value of `count` votes when all of them agree, else None (paper section 3.1: data filtering)."""
    if len(votes) < count or any(vote is None or vote != votes[0] for vote in votes):
        return None
    return votes[0]
