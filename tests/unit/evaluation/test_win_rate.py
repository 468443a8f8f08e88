"""The held-out comparison counts honestly: ties, failures, and prefixes that share a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import metaspace_tokenizer

from megatron_sip.evaluation.win_rate import (
    WinRate,
    bootstrap_interval,
    compare,
    continue_prefixes,
    wilson_interval,
)
from megatron_sip.metrics import Mean
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings


def continuation(text: str) -> Candidate:
    return Candidate("rollout", [1], text)


class Scripted:
    """A judge without a server: criterion scores of each prefix from a table."""

    def __init__(self, weights: dict[str, float], scores: Sequence[dict[str, list[float]]]) -> None:
        self.weights = weights
        self._scores = scores
        self.objectives: list[str] = []

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        self.objectives.append(objective)
        totals = [[sum(w * s[name][i] for name, w in self.weights.items()) for i in (0, 1)] for s in self._scores]
        return [
            replace(group, scores=total, criterion_scores=scores)
            for group, total, scores in zip(groups, totals, self._scores, strict=True)
        ]

    def counters(self) -> dict[str, float]:
        return {}

    def means(self) -> dict[str, Mean]:
        return {}


class LongerIsBetter:
    """A judge without a server: log-probs are lengths, an empty prefix text gets no verdict."""

    weights: ClassVar = {"likelihood": 1.0}

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        judged = []
        for group in groups:
            lengths = [float(len(c.text)) for c in group.candidates]
            scored = replace(group, scores=lengths, criterion_scores={"likelihood": lengths})
            judged.append(scored if group.task.prefix_text else replace(group, dropped="judge-timeout"))
        return judged

    def counters(self) -> dict[str, float]:
        return {}

    def means(self) -> dict[str, Mean]:
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


async def run_scripted(judge: Scripted, documents: Sequence[int] | None = None) -> WinRate:
    count = len(judge._scores)
    tasks = [Task(index, [1], [2], "text", "") for index in range(count)]
    texts = [continuation("a")] * count
    return (await compare(judge, tasks, documents or range(count), texts, texts, seed=0))[0]


async def test_the_win_rate_is_the_mean_of_the_judgements_not_of_thresholds() -> None:
    """The paper's mean: 100 prompts, each preferred with 0.6, are a win rate of 0.6, not of 1."""
    judge = Scripted({"quality": 1.0}, [{"quality": [0.4, 0.6]}] * 100)
    result = await run_scripted(judge)
    assert result.win_rate == pytest.approx(0.6)
    assert result.by_criterion == {"quality": pytest.approx(0.6)}
    assert judge.objectives == ["pair"]


async def test_criteria_count_with_their_weights_and_each_on_its_scale() -> None:
    """Pointwise verdicts: before was safe in 1 of 4, after in 3 of 4: of two drawn verdicts after's wins 9/16 and ties
    6/16. A difference of rounding in the likelihood is a tie."""
    scores = {"quality": [0.2, 0.8], "safety": [0.25, 0.75], "likelihood": [-1.5, -1.5 - 1e-12]}
    result = await run_scripted(Scripted({"quality": 2.0, "safety": 1.0, "likelihood": 1.0}, [scores] * 4))
    assert result.by_criterion == pytest.approx({"quality": 0.8, "safety": (9 + 3) / 16, "likelihood": 0.5})
    assert result.win_rate == pytest.approx((2 * 0.8 + 0.75 + 0.5) / 4)


async def test_wins_on_all_of_few_documents_are_no_certainty(caplog: pytest.LogCaptureFixture) -> None:
    won = [{"quality": [0.0, 1.0]}]
    few = await run_scripted(Scripted({"quality": 1.0}, won * 5))
    assert few.win_rate == 1.0
    assert few.win_rate_ci95 == pytest.approx((0.566, 1.0), abs=1e-3)  # Wilson, 5 of 5
    assert "5 documents" in caplog.text
    caplog.clear()
    many = await run_scripted(Scripted({"quality": 1.0}, won * 400))
    assert many.win_rate_ci95 == pytest.approx((0.990, 1.0), abs=1e-3)
    assert not caplog.text
    one_document = await run_scripted(Scripted({"quality": 1.0}, won * 400), [7] * 400)
    assert one_document.win_rate_ci95[0] < 0.25


@given(st.integers(1, 60), st.integers(0, 60))
def test_wilson_against_its_definition(count: int, wins: int) -> None:
    """The ends are where the observed share is 1.96 standard errors away."""
    share = min(wins, count) / count
    for end in wilson_interval(share, count):
        assert 0 <= end <= 1
        assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-9)


async def test_continuations_read_as_they_follow_the_prefix() -> None:
    tokenizer = metaspace_tokenizer()
    prefix = tokenizer.encode("The quick", add_special_tokens=False)
    fox = tokenizer.encode("The quick brown fox", add_special_tokens=False)[len(prefix) :]

    class Engines:
        async def generate(self, prefixes: Sequence[list[int]], settings: Any, *, weight_version: str) -> list[Any]:
            made = Completion([*fox, tokenizer.eos_token_id], [-1.0] * (len(fox) + 1), "stop", weight_version)
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


def test_a_bootstrap_in_blocks_draws_what_one_in_a_piece_does(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes, documents = np.random.default_rng(0).random(90), [i // 3 for i in range(90)]
    whole = bootstrap_interval(outcomes, documents, seed=5)
    monkeypatch.setattr("megatron_sip.evaluation.win_rate.DRAWS_AT_ONCE", 1000)
    assert bootstrap_interval(outcomes, documents, seed=5) == whole
