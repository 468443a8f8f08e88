"""Criteria on their own: answers in, scores and vote counts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import make_settings

from megatron_sip.judge.calls import Answer, Call, ChoiceCall, GenerateCall, LikelihoodCall
from megatron_sip.judge.criteria import Ask, CriterionScores, Likelihood, Sheet, comparable, make_criterion
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
    partly = answering(lambda call: None if call.prompt[1] == "bb" else -1.0)
    assert (await Likelihood().score(SHEET, partly)).missing == "too-few-verdicts"
    empty = replace(SHEET, candidates=("a", ""), kinds=("suffix", "rollout"))
    nothing = answering(lambda call: -1.0 if call.prompt[1] else None)
    assert (await Likelihood().score(empty, nothing)).missing == "empty-candidate"


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=17))
def test_likelihoods_in_a_sum_are_win_rates_in_the_same_order(values: list[float]) -> None:
    rates = comparable("likelihood", values, alone=False, likelihood_scale=0.25)
    assert np.all((rates >= 0) & (rates <= 1))
    assert rates.sum() == pytest.approx(len(values) / 2)
    order = np.argsort(values)
    assert np.all(np.diff(rates[order]) >= -1e-12)
    np.testing.assert_array_equal(comparable("likelihood", values, alone=True, likelihood_scale=0.25), values)
    np.testing.assert_array_equal(comparable("quality", values, alone=False, likelihood_scale=0.25), values)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=4, max_size=4), min_size=4, max_size=4))
async def test_pointwise_means_are_over_the_votes_that_came(votes: list[list[float | None]]) -> None:
    replies = iter(votes)
    criterion = make_criterion("safety", make_settings("http://a", criteria={"safety": 1.0}, votes=4))
    result = await criterion.score(SHEET, answering(lambda call: next(replies)))
    valid = [[vote for vote in own if vote is not None] for own in votes]
    if min(map(len, valid)) < 2:
        assert result.missing == "too-few-verdicts"
        assert not result.scores
    else:
        assert result.scores == pytest.approx([np.mean(own) for own in valid])
        assert result.votes == tuple(map(len, valid))
    assert result.planned == 16
    assert result.received == sum(map(len, valid))


async def quality(reply: Callable[[Call], Answer], seen: list[Call], **changes: object) -> CriterionScores:
    settings = make_settings("http://a", **({"schedule": ScheduleSettings("all_pairs")} | changes))
    return await make_criterion("quality", settings).score(SHEET, answering(reply, seen))


async def test_soft_all_pairs_reads_both_orders_and_circulant_one() -> None:
    for name, both, calls in (
        ("all_pairs", False, 12),
        ("circulant_bt", False, 6),
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


async def test_repeated_questions_are_new_draws() -> None:
    """An adaptive schedule asks an undecided pair again: that must be another sample, not the cached one."""
    seen: list[Call] = []
    await quality(lambda call: [1.0], seen, schedule=ScheduleSettings("two_ended_bt", budget=60))
    assert len(seen) == 60
    keys = {(call.prompt, call.salt) for call in seen if isinstance(call, GenerateCall)}
    assert len(keys) == 60


async def test_a_candidate_without_verdicts_leaves_the_group_unscored() -> None:
    def reply(call: Call) -> Answer:
        return [None] if any("\ndddd\n" in piece for piece in call.prompt) else [1.0]

    assert (await quality(reply, [])).missing == "too-few-verdicts"


async def test_groups_of_candidates_that_never_met_are_not_compared() -> None:
    def reply(call: Call) -> Answer:
        shown = "".join(call.prompt)
        left = ("\na\n" in shown) + ("\nbb\n" in shown)
        return [None] if left == 1 else [1.0]

    assert (await quality(reply, [], quorum=0.01)).missing == "too-few-verdicts"


async def test_the_likelihood_prior_decides_where_verdicts_do_not() -> None:
    seen: list[Call] = []

    def reply(call: Call) -> Answer:
        return -0.1 * len(call.prompt[1]) if isinstance(call, LikelihoodCall) else 0.5

    schedule = ScheduleSettings("circulant_bt", degree=2, likelihood_prior=True)
    result = await quality(reply, seen, schedule=schedule, default_verdict="soft", **NATIVE)
    assert sum(isinstance(call, LikelihoodCall) for call in seen) == 4
    assert list(np.argsort(result.scores)) == [3, 2, 1, 0]
