"""Held-out comparison of two policies: continuations of the same prefixes, judged (paper section 3.3).

The prefixes come from documents that training never saw. A win counts 1, a tie 0.5; the interval is a bootstrap over
prefixes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.experience import ScoresGroups
from megatron_sip.rollout.sglang import Failure, SamplingSettings, SGLangPool
from megatron_sip.samples import Candidate, Group, Task

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often the second policy was preferred over the first.

    win_rate_ci95: percentile bootstrap over prefixes. prompts: prefixes with a verdict. failed: prefixes without one
    (engine failure, missing votes). mean_scores: the judge's mean score of the first and the second policy.
    """

    win_rate: float
    win_rate_ci95: tuple[float, float]
    prompts: int
    failed: int
    mean_scores: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One judged prefix, for the report: score_before and score_after are None when there was no verdict."""

    prefix: str
    before: str
    after: str
    score_before: float | None
    score_after: float | None


async def continue_prefixes(
    engines: SGLangPool, tasks: Sequence[Task], sampling: SamplingSettings, tokenizer: Any
) -> list[Candidate | None]:
    """One continuation a task; None where the engine failed."""
    answers = await engines.generate([task.prefix_ids for task in tasks], sampling)
    continuations: list[Candidate | None] = []
    for answer in answers:
        if isinstance(answer, Failure) or not answer[0].ids:
            continuations.append(None)
        else:
            text = tokenizer.decode(answer[0].ids, skip_special_tokens=True)
            continuations.append(Candidate("rollout", list(answer[0].ids), text))
    return continuations


def save_continuations(path: Path, continuations: Sequence[Candidate | None]) -> None:
    """Write continuations as JSON; the file appears only when it is complete."""
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps([asdict(c) if c is not None else None for c in continuations]), encoding="utf-8")
    os.replace(staged, path)  # noqa: PTH105 (atomic on one file system)


def load_continuations(path: Path) -> list[Candidate | None]:
    """Inverse of `save_continuations`."""
    return [Candidate(**c) if c is not None else None for c in json.loads(path.read_text(encoding="utf-8"))]


async def compare(
    judge: ScoresGroups,
    tasks: Sequence[Task],
    before: Sequence[Candidate | None],
    after: Sequence[Candidate | None],
    seed: int,
) -> tuple[WinRate, list[Comparison]]:
    """Judge `after` against `before` on every task where both exist.

    Raises:
        RuntimeError: not a single prefix got a verdict.
    """
    pairs = [(t, b, a) for t, b, a in zip(tasks, before, after, strict=True) if b is not None and a is not None]
    judged = await judge.score([Group(task, [b, a]) for task, b, a in pairs], objective="dpo")
    comparisons = [as_comparison(group) for group in judged]
    scored = [(c.score_before, c.score_after) for c in comparisons if c.score_before is not None]
    if not scored:
        raise RuntimeError(f"none of the {len(tasks)} held-out prefixes got a verdict: is the teacher reachable?")
    scores = np.array(scored, dtype=np.float64)
    outcomes = np.where(scores[:, 1] == scores[:, 0], 0.5, scores[:, 1] > scores[:, 0])
    means = scores.mean(axis=0)
    return (
        WinRate(
            win_rate=float(outcomes.mean()),
            win_rate_ci95=bootstrap_interval(outcomes, seed),
            prompts=len(outcomes),
            failed=len(tasks) - len(outcomes),
            mean_scores=(float(means[0]), float(means[1])),
        ),
        comparisons,
    )


class HeldOutComparison:
    """The trained policy against the initial one on fixed held-out prefixes, through the same engines and judge."""

    def __init__(
        self, tasks: Sequence[Task], sampling: SamplingSettings, tokenizer: Any, initial: Path, seed: int
    ) -> None:
        self._tasks = tasks
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._initial = initial
        self._seed = seed

    async def record_initial(self, engines: SGLangPool) -> None:
        """Write the initial policy's continuations, before the first step."""
        save_continuations(self._initial, await self._continue(engines))

    async def finish(self, engines: SGLangPool, judge: ScoresGroups) -> tuple[WinRate, list[Comparison]]:
        """Continue with the present weights and judge against the initial continuations.

        Raises:
            FileNotFoundError: the initial continuations are gone, so there is nothing to compare with.
        """
        if not self._initial.exists():
            raise FileNotFoundError(f"{self._initial}: the initial policy's continuations, written at step 0, are gone")
        before = load_continuations(self._initial)
        return await compare(judge, self._tasks, before, await self._continue(engines), self._seed)

    async def _continue(self, engines: SGLangPool) -> list[Candidate | None]:
        return await continue_prefixes(engines, self._tasks, self._sampling, self._tokenizer)


def as_comparison(group: Group) -> Comparison:
    """A judged (before, after) group as a line of the report."""
    before, after = group.candidates
    scores = group.scores if group.scores is not None else [None, None]
    return Comparison(group.task.prefix_text, before.text, after.text, scores[0], scores[1])


def bootstrap_interval(outcomes: np.ndarray, seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean of `outcomes` [n] over resampled prefixes."""
    draws = np.random.default_rng(seed).integers(0, len(outcomes), size=(RESAMPLES, len(outcomes)))
    low, high = np.percentile(outcomes[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
