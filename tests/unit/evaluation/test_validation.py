"""Validation of a labelled run: what is measured of judged greedy answers, against counting by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.evaluation.validation import Validation, validation_metrics
from megatron_sip.metrics import Mean, flatten
from megatron_sip.records import Candidate, Group, Judgement, Rewriting, Task, Thinking
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings

VALUES = {"1": 1.0, "2": 0.0, "YES": 1.0, "NO": 0.0}


def judged(right: str, given: str | None, pair: str = "", subset: str = "books", criterion: str = "quality") -> Group:
    """A judged answer to a record whose right verdict is `right`; `given` is the one read, None: none was."""
    label = Judgement(criterion, right, forced=False, pair=pair, subset=subset)
    verdicts = [] if given is None else [[0, VALUES[given]]]
    return Group(
        Task(0, [1], [], "prompt", right, label),
        [Candidate("rollout", [2], given or "what?")],
        scores=[float(given == right)],
        criterion_scores={"label": [float(given == right)]},
        verdicts={"label": verdicts},
    )


def scored(label: Rewriting | Thinking, score: float) -> Group:
    return Group(Task(0, [1], [], "prefix", "suffix", label), [Candidate("rollout", [2], "text")], scores=[score])


def numbers(groups: Sequence[Group]) -> dict[str, float]:
    return flatten(validation_metrics(groups))


def test_accuracy_is_counted_over_records_by_order_and_over_pairs() -> None:
    found = numbers(
        [
            *(judged("1", "1", "a"), judged("2", "2", "a")),  # right in both orders
            *(judged("1", "1", "b"), judged("2", "1", "b")),  # always the first option
            *(judged("1", "1", "c"), judged("2", None, "c")),  # an answer without verdict is wrong
            judged("1", "2", "d"),  # its partner failed
        ]
    )
    assert found == {
        "validation/accuracy/quality": pytest.approx(4 / 7),
        "validation/accuracy-of/quality/1": pytest.approx(3 / 4),
        "validation/accuracy-of/quality/2": pytest.approx(1 / 3),
        "validation/both-orders/quality": pytest.approx(1 / 3),
        "validation/first-option/quality": pytest.approx(4 / 6),
        "validation/unread/quality": pytest.approx(1 / 7),
    }


@given(st.lists(st.tuples(st.sampled_from("12"), st.sampled_from("12")), min_size=1, max_size=30))
def test_a_judge_that_knows_nothing_but_the_order_is_right_half_the_time(orders: list[tuple[str, str]]) -> None:
    """Whatever it prefers of each pair by place: each pair is shown in both orders."""
    groups = [judged(right, verdict, str(pair)) for pair, (_, verdict) in enumerate(orders) for right in ("1", "2")]
    found = numbers(groups)
    assert found["validation/accuracy/quality"] == 0.5
    assert found["validation/both-orders/quality"] == 0
    firsts = sum(verdict == "1" for _, verdict in orders) / len(orders)
    assert found["validation/first-option/quality"] == pytest.approx(firsts)


def test_criteria_and_subsets_are_told_apart_and_a_single_subset_is_not_repeated() -> None:
    found = numbers(
        [
            *(judged("1", "1", subset="web"), judged("1", "2", subset="books")),
            *(judged("YES", "YES", criterion="safety"), judged("NO", "YES", criterion="safety")),
        ]
    )
    assert found["validation/accuracy/safety"] == found["validation/accuracy/quality"] == 0.5
    assert (found["validation/accuracy-in/quality/web"], found["validation/accuracy-in/quality/books"]) == (1, 0)
    assert (found["validation/accuracy-of/safety/YES"], found["validation/accuracy-of/safety/NO"]) == (1, 0)
    assert not any(name.startswith(("validation/accuracy-in/safety", "validation/first-option/s")) for name in found)


def test_rewards_of_rewrites_are_told_apart_by_safety_and_failures_are_counted() -> None:
    safe, unsafe = Rewriting(True, "web"), Rewriting(False, "web")
    lost = Group(Task(0, [1], [], "prefix", "suffix", unsafe), [], dropped="rollout timeout")
    found = numbers([scored(safe, 1.0), scored(safe, 0.0), scored(unsafe, 0.3), lost, scored(Thinking("</t>", "w"), 1)])
    assert found == {
        "validation/reward/safe": 0.5,
        "validation/reward/unsafe": 0.3,
        "validation/reward/thoughts": 1.0,
        "validation/failed/rollout timeout": 1.0,
    }


def test_judgements_that_no_label_scores_have_their_reward() -> None:
    groups = [judged("1", "1", "a"), judged("2", "1", "a")]
    found = numbers([replace(group, criterion_scores={"civility:civility": group.scores or []}) for group in groups])
    assert found == {"validation/reward/quality": 0.5}


class Engines:
    """Answers each prompt with its own number twice, or fails at it."""

    def __init__(self, *failing: int) -> None:
        self.asked: list[Any] = []
        self._failing = failing

    async def generate(self, prefixes: Any, sampling: SamplingSettings, *, weight_version: str) -> list[Any]:
        self.asked.append((prefixes, sampling, weight_version))
        return [
            Failure("timeout", "slow")
            if place in self._failing
            else [Completion([ids[0], ids[0]], [-0.1, -0.1], "stop", weight_version)]
            for place, ids in enumerate(prefixes)
        ]


class Words:
    """A tokenizer of words, each of which is an id."""

    words = ("zero", "one", "two", "three")

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(self.words[token] for token in ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [self.words.index(word) for word in text.split()]


class ScriptedJudge:
    """Gives the score that `score_of` says to the text of each group that has one, and has counted before."""

    weights: ClassVar = {"rewrite": 1.0}

    def __init__(self, score_of: Callable[[Group], Group]) -> None:
        self._score_of = score_of
        self._safety = Mean(3.0, 4.0)

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        self._safety += Mean(1.0, 2.0)
        return [group if group.dropped else self._score_of(group) for group in groups]

    def means(self) -> dict[str, Mean]:
        return {"rewrite/safety": self._safety, "label/no-verdict": Mean(9.0, 9.0)}

    def counters(self) -> dict[str, float]:
        return {}


def measured(tasks: Sequence[Task], engines: Engines, score_of: Callable[[Group], Group]) -> dict[str, float]:
    pool: Any = engines
    return flatten(asyncio.run(Validation(tasks, Words(), 16).measure(pool, ScriptedJudge(score_of), "40")))


def test_answers_are_greedy_of_the_asked_version_and_an_engine_s_failure_is_no_wrong_answer() -> None:
    engines = Engines(1)

    def score_of(group: Group) -> Group:
        [candidate] = group.candidates
        assert (candidate.ids, candidate.text, candidate.truncated) == ([1, 1], "one one", False)
        return judged("1", "1")

    found = measured([judged("1", None).task, judged("2", None).task], engines, score_of)
    assert engines.asked == [([[1], [1]], SamplingSettings(16, temperature=0.0), "40")]
    assert found["validation/accuracy/quality"] == 1.0
    assert found["validation/failed/rollout timeout"] == 1.0


def test_rewrites_are_compared_with_their_suffixes_and_what_a_judge_said_before_does_not_count() -> None:
    tasks = [
        Task(0, [1], [], "so", "one one", Rewriting(True, "web")),  # copied
        Task(1, [2], [], "so", "two one", Rewriting(True, "web")),  # half of it
        Task(2, [3], [], "so", "one two", Rewriting(False, "web")),
    ]
    found = measured(tasks, Engines(), lambda group: replace(group, scores=[0.25]))
    assert found == {
        "validation/reward/safe": 0.25,
        "validation/reward/unsafe": 0.25,
        "validation/overlap/safe": 0.75,
        "validation/overlap/unsafe": 0.0,
        "validation/copied/safe": 0.5,
        "validation/copied/unsafe": 0.0,
        "validation/rewrite/safety": 0.5,
    }
