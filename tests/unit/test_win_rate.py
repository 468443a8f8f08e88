"""The held-out comparison counts honestly: ties, failures, and prefixes that share a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import metaspace_tokenizer

from megatron_sip.data.errors import DataError
from megatron_sip.evaluation.win_rate import (
    HeldOutComparison,
    bootstrap_interval,
    compare,
    continue_prefixes,
    save_continuations,
)
from megatron_sip.rollout.sglang import Completion, Failure, SamplingSettings
from megatron_sip.samples import Candidate, Group, Task


def continuation(text: str) -> Candidate:
    return Candidate("rollout", [1], text)


class LongerIsBetter:
    """A judge without a server: scores are lengths, an empty prefix text gets no verdict."""

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        return [
            replace(group, scores=[float(len(c.text)) for c in group.candidates])
            if group.task.prefix_text
            else replace(group, dropped="judge-timeout")
            for group in groups
        ]

    def counters(self) -> dict[str, float]:
        return {}


async def test_wins_ties_losses_and_failures() -> None:
    tasks = [Task(index, [1], [2], "text" if index != 4 else "", "") for index in range(5)]
    before = [continuation("aa"), continuation("aa"), continuation("aa"), None, continuation("a")]
    after = [continuation("aaa"), continuation("aa"), continuation("a"), continuation("a"), continuation("aa")]
    result, comparisons = await compare(LongerIsBetter(), tasks, list(range(5)), before, after, seed=0)
    assert result.win_rate == pytest.approx((1 + 0.5 + 0) / 3)
    assert result.prompts == result.documents == 3
    assert result.failed == 2  # one without a continuation, one without a verdict
    assert len(comparisons) == 4


async def test_continuations_read_as_they_follow_the_prefix() -> None:
    tokenizer = metaspace_tokenizer()
    prefix = tokenizer.encode("The quick", add_special_tokens=False)
    fox = tokenizer.encode("The quick brown fox", add_special_tokens=False)[len(prefix) :]

    class Engines:
        async def generate(self, prefixes: Sequence[list[int]], settings: Any, *, weight_version: str) -> list[Any]:
            made = Completion([*fox, tokenizer.eos_token_id], None, [-1.0] * (len(fox) + 1), "stop", weight_version)
            return [[made], Failure("timeout", "no answer")]

    tasks = [Task(index, prefix, [1], "The quick", "") for index in range(2)]
    made = await continue_prefixes(Engines(), tasks, SamplingSettings(64), tokenizer, "0")  # type: ignore[arg-type]
    assert made == [Candidate("rollout", [*fox, tokenizer.eos_token_id], " brown fox"), None]


async def test_no_verdict_at_all_is_an_error_not_a_tie() -> None:
    tasks = [Task(0, [1], [2], "", "")]
    with pytest.raises(RuntimeError, match="verdict"):
        await compare(LongerIsBetter(), tasks, [0], [continuation("a")], [continuation("b")], seed=0)


def test_the_interval_widens_when_prefixes_share_documents() -> None:
    outcomes = np.repeat(np.random.default_rng(0).integers(0, 2, size=20), 10).astype(float)
    alone = bootstrap_interval(outcomes, range(200), seed=1)
    shared = bootstrap_interval(outcomes, np.repeat(np.arange(20), 10).tolist(), seed=1)
    assert shared[1] - shared[0] > 2 * (alone[1] - alone[0])  # 10 copies of one verdict are one observation
    assert shared[0] <= outcomes.mean() <= shared[1]


def test_a_comparison_that_cannot_end_is_refused_before_training(tmp_path: Path) -> None:
    initial = tmp_path / "initial_continuations.json"
    tasks = [Task(0, [1], [2], "text", "")]
    comparison = HeldOutComparison(tasks, [0], SamplingSettings(8), None, initial, 0)
    with pytest.raises(DataError, match="--win-rate-prompts 0"):
        comparison.check_initial()
    save_continuations(initial, [continuation("a"), None])
    with pytest.raises(DataError, match="--win-rate-prompts 2"):
        comparison.check_initial()
    save_continuations(initial, [None])
    comparison.check_initial()
