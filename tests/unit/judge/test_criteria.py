"""Criteria on their own: answers in, scores and vote counts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import make_settings

from megatron_sip.judge.calls import Answer, Call, ChoiceCall, GenerateCall, LikelihoodCall, cache_material
from megatron_sip.judge.catalogue import make_criterion
from megatron_sip.judge.criteria import Ask, CriterionScores, Likelihood, Sheet, comparable
from megatron_sip.judge.settings import Endpoint, ScheduleSettings

SHEET = Sheet(
    "prefix", "suffix", ("a", "bb", "ccc", "dddd"), ("suffix", "rollout", "rollout", "rollout"), "c0de", (1,), "dpo"
)
NATIVE = {"endpoints": (Endpoint("http://a"),)}


def answering(reply: Callable[[Call], Answer], seen: list[Call] | None = None) -> Ask:
    async def ask(calls: Sequence[Call]) -> list[Answer]:
        if seen is not None:
            seen.extend(calls)
        return [reply(call) for call in calls]

    return ask


async def test_likelihood_passes_the_logprobs_through() -> None:
    ask = answering(lambda call: -float(len(call.prompt[1])))
    assert (await Likelihood().score(SHEET, ask)).scores == (-1.0, -2.0, -3.0, -4.0)
    partly = await Likelihood().score(SHEET, answering(lambda call: None if call.prompt[1] == "bb" else -1.0))
    assert (partly.scores, partly.missing) == ((-1.0, None, -1.0, -1.0), "too-few-verdicts")
    empty = replace(SHEET, candidates=("a", ""), kinds=("suffix", "rollout"))
    nothing = await Likelihood().score(empty, answering(lambda call: -1.0 if call.prompt[1] else None))
    assert (nothing.scores, nothing.missing) == ((-1.0, None), "empty-candidate")


async def test_the_likelihood_of_a_candidate_that_ended_is_that_of_its_end_too() -> None:
    seen: list[Call] = []
    sheet = replace(SHEET, candidates=("a", "a", ""), kinds=("suffix", "rollout", "rollout"), ended=frozenset({1, 2}))
    result = await Likelihood().score(sheet, answering(lambda call: -2.0 if call.ended else -1.0, seen))
    assert result.scores == (-1.0, -2.0, -2.0)
    assert result.missing is None
    assert len({cache_material(call, "model") for call in seen}) == 3


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=17))
def test_likelihoods_in_a_sum_are_win_rates_in_the_same_order(values: list[float]) -> None:
    rates = comparable("likelihood", values, alone=False)
    assert np.all((rates >= 0) & (rates <= 1))
    assert rates.sum() == pytest.approx(len(values) / 2)
    order = np.argsort(values)
    assert np.all(np.diff(rates[order]) >= -1e-12)
    np.testing.assert_array_equal(comparable("likelihood", values, alone=True), values)
    np.testing.assert_array_equal(comparable("quality", values, alone=False), values)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=4, max_size=4), min_size=4, max_size=4))
async def test_pointwise_means_are_over_the_votes_that_came(votes: list[list[float | None]]) -> None:
    replies = iter(votes)
    criterion = make_criterion("safety", make_settings("http://a", criteria={"safety": 1.0}, votes=4))
    result = await criterion.score(SHEET, answering(lambda call: next(replies, None)))  # asked again: no answer
    valid = [[vote for vote in own if vote is not None] for own in votes]
    assert result.scores == tuple(pytest.approx(np.mean(own)) if len(own) >= 2 else None for own in valid)
    assert result.missing == ("too-few-verdicts" if min(map(len, valid)) < 2 else None)
    assert result.votes == tuple(map(len, valid))
    assert result.planned == 16
    assert result.received == sum(map(len, valid))


async def quality(reply: Callable[[Call], Answer], seen: list[Call], **changes: object) -> CriterionScores:
    settings = make_settings("http://a", **({"schedule": ScheduleSettings("all_pairs")} | changes))
    return await make_criterion("quality", settings).score(SHEET, answering(reply, seen))


async def test_soft_all_pairs_reads_both_orders_and_circulant_one() -> None:
    for name, both, calls in (
        ("all_pairs", False, 12),
        ("circulant_bt", False, 8),  # 6 pairs; the two across the circle in both orders, so that all are balanced
        ("circulant_bt", True, 12),
        ("pivot", False, 6),
    ):
        seen: list[Call] = []
        result = await quality(
            lambda call: 0.8,
            seen,
            default_verdict="soft",
            schedule=ScheduleSettings(name, degree=4, both_orders=both),
            **NATIVE,
        )
        assert len(seen) == result.received == calls
        assert all(isinstance(call, ChoiceCall) for call in seen)
        # A judge that always leans to the first option says nothing about the candidates.
        assert result.scores == pytest.approx([0.5] * 4, abs=0.12 if name == "circulant_bt" and not both else 1e-6)


@pytest.mark.parametrize(("name", "calls"), [("circulant_bt", 12), ("two_ended_bt", 8)])
async def test_with_both_orders_every_hard_vote_is_asked_in_both(name: str, calls: int) -> None:
    seen: list[Call] = []
    schedule = ScheduleSettings(name, degree=4, budget=6, both_orders=True)
    await quality(lambda call: [1.0] * call.n, seen, votes=1, schedule=schedule)  # type: ignore[union-attr]
    shown = [
        tuple(text for text in ("\na\n", "\nbb\n", "\nccc\n", "\ndddd\n") if text in "".join(call.prompt))
        for call in seen
    ]  # type: ignore[union-attr]
    assert len(seen) == calls
    assert set(Counter(shown).values()) == {2}


async def test_repeated_questions_are_new_draws() -> None:
    """An adaptive schedule asks an undecided pair again: that must be another sample, not the cached one."""
    seen: list[Call] = []
    await quality(lambda call: [1.0], seen, schedule=ScheduleSettings("two_ended_bt", budget=60))
    assert len(seen) == 60
    keys = {(call.prompt, call.salt) for call in seen if isinstance(call, GenerateCall)}
    assert len(keys) == 60


@pytest.mark.parametrize("name", ["all_pairs", "circulant_bt", "two_ended_bt"])
async def test_a_candidate_without_verdicts_is_left_out_and_the_others_are_scored(name: str) -> None:
    def reply(call: Call) -> Answer:
        assert isinstance(call, GenerateCall)
        return [None if any("\ndddd\n" in piece for piece in call.prompt) else 1.0] * call.n

    result = await quality(reply, [], schedule=ScheduleSettings(name))
    assert result.missing == "too-few-verdicts"
    assert [score is None for score in result.scores] == [False, False, False, True]


async def test_missing_votes_are_asked_for_once_more_as_new_draws() -> None:
    """Of five votes two are unreadable, then one of these two: it stays missing."""
    seen: list[GenerateCall] = []

    def reply(call: Call) -> Answer:
        assert isinstance(call, GenerateCall)
        seen.append(call)
        return [1.0] * (call.n - 1) + [None] if call.again else [1.0] * (call.n - 2) + [None, None]

    result = await quality(reply, [], votes=5, quorum=1.0)
    assert (result.planned, result.received) == (6 * 5, 6 * (5 - 2))  # 3 and 2 votes in the two orders of each pair
    assert Counter((call.n, call.again) for call in seen) == {(3, False): 6, (2, False): 6, (2, True): 12}
    assert len({cache_material(call, "model") for call in seen}) == len(seen)


async def test_of_candidates_that_never_met_the_largest_set_is_compared() -> None:
    def reply(call: Call) -> Answer:
        shown = "".join(call.prompt)
        left = ("\na\n" in shown) + ("\nbb\n" in shown)
        return [None] if left == 1 else [1.0]

    result = await quality(reply, [], quorum=0.01)
    assert result.missing == "too-few-verdicts"
    assert [score is None for score in result.scores] == [False, False, True, True]


async def test_a_pivot_apart_is_met_by_all_and_scored_by_none() -> None:
    seen: list[Call] = []
    sheet = replace(SHEET, pivot=3, apart=True)
    settings = make_settings("http://a", criteria={"quality": 1.0, "safety": 1.0}, schedule=ScheduleSettings("pivot"))

    def reply(call: Call) -> Answer:
        assert isinstance(call, GenerateCall)
        seen.append(call)
        return [1.0] * call.n

    for name, calls in (("quality", 3), ("safety", 3)):
        seen.clear()
        result = await make_criterion(name, settings).score(sheet, answering(reply))
        assert len(result.scores) == len(result.votes) == 3
        assert len(seen) == calls
        shown = ["".join(call.prompt).count("\ndddd\n") for call in seen]
        assert shown == [1 if name == "quality" else 0] * calls


async def test_the_likelihood_prior_decides_where_verdicts_do_not() -> None:
    seen: list[Call] = []

    def reply(call: Call) -> Answer:
        return -0.1 * len(call.prompt[1]) if isinstance(call, LikelihoodCall) else 0.5

    schedule = ScheduleSettings("circulant_bt", degree=2, likelihood_prior=True)
    result = await quality(reply, seen, schedule=schedule, default_verdict="soft", **NATIVE)
    assert sum(isinstance(call, LikelihoodCall) for call in seen) == 4
    assert list(np.argsort(result.scores)) == [3, 2, 1, 0]
