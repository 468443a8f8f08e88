"""GRPO's advantages: group-relative, of rollouts alone, with what is left out counted by reason."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.experience.advantages import TIE_TOLERANCE, group_advantages, reward_metrics, sampled_branches
from megatron_sip.experience.selection import SelectionSettings, select
from megatron_sip.metrics import flatten
from megatron_sip.records import Candidate, Group, Task

SCORES = st.lists(st.floats(-100, 100), min_size=2, max_size=16)


def rollout(*ids: int, truncated: bool = False) -> Candidate:
    return Candidate("rollout", list(ids), "", [-0.5] * len(ids), "3", truncated)


def group(candidates: list[Candidate], scores: list[float] | None, index: int = 0, dropped: str | None = None) -> Group:
    return Group(Task(index, [1, 2], [9], "", ""), candidates, scores, dropped=dropped)


FOUR = [rollout(5), rollout(6, 6), rollout(7, 7, 7, truncated=True), rollout(5)]


@given(SCORES, st.booleans())
def test_advantages_are_centred_keep_the_order_and_have_the_spread_that_is_asked_for(scores, by_spread):
    found = group_advantages(scores, by_spread=by_spread)
    if max(scores) - min(scores) <= TIE_TOLERANCE:
        assert found is None
        return
    assert found is not None
    spread = statistics.stdev(scores)
    mean = statistics.fmean(scores)
    scale = spread if by_spread else 1.0
    assert found == pytest.approx([(score - mean) / scale for score in scores], rel=1e-9, abs=1e-9)
    assert math.fsum(found) == pytest.approx(0, abs=1e-9 * max(map(abs, scores)) + 1e-6 * by_spread)


@given(SCORES, st.floats(-50, 50))
def test_a_constant_reward_changes_no_advantage(scores, constant):
    before, after = group_advantages(scores), group_advantages([score + constant for score in scores])
    if before is not None and max(scores) - min(scores) > 1e-6:
        assert after == pytest.approx(before, abs=1e-9)


def test_all_rollouts_are_trained_on_equal_ones_too_and_other_kinds_are_only_compared_with():
    candidates = [Candidate("suffix", [9], "s"), *FOUR]
    (example,) = select([group(candidates, [9.0, 1.0, 0.0, 0.5, 0.5])], SelectionSettings("grpo")).examples
    assert [branch.ids for branch in example.branches] == [[5], [6, 6], [7, 7, 7], [5]]
    assert {(branch.role, branch.kind) for branch in example.branches} == {("sampled", "rollout")}
    assert [branch.advantage for branch in example.branches] == pytest.approx([0.5, -0.5, 0.0, 0.0])
    assert [len(branch.engine_logprobs or []) for branch in example.branches] == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("truncated", "expected"), [("score", [-0.5, -0.5, 1.5, -0.5]), ("mask", None), ("zero", None)]
)
def test_what_was_cut_counts_as_asked_for(truncated, expected):
    found = sampled_branches(group(FOUR, [0.0, 0.0, 2.0, 0.0]), truncated, by_spread=False)
    assert found == "no spread" if expected is None else [branch.advantage for branch in found] == expected


def test_a_masked_rollout_is_in_neither_the_loss_nor_the_baseline():
    found = sampled_branches(group(FOUR, [1.0, 0.0, 50.0, 0.5]), "mask", by_spread=False)
    assert [(branch.ids, branch.advantage) for branch in found] == [([5], 0.5), ([6, 6], -0.5), ([5], 0.0)]


def test_zero_is_the_score_of_an_answer_that_was_cut():
    found = sampled_branches(group(FOUR, [1.0, 1.0, 1.0, 1.0]), "zero", by_spread=False)
    assert [branch.advantage for branch in found] == [0.25, 0.25, -0.75, 0.25]


def test_every_group_becomes_an_example_or_is_counted():
    groups = [
        group(FOUR, [1.0, 0.0, 0.0, 0.0]),
        group(FOUR, [0.3, 0.1 + 0.2, 0.3, 0.3]),
        group(FOUR, None),
        group(FOUR, None, dropped="rollout timeout"),
        group(FOUR[:1], [1.0]),
        group([*FOUR[:1], rollout()], [1.0, 0.0]),
        group(FOUR, [1.0, 0.0, math.nan, 0.0]),
    ]
    selected = select(groups, SelectionSettings("grpo"))
    assert len(selected.examples) == 1
    assert selected.dropped == {
        "no spread": 1,
        "unscored": 1,
        "rollout timeout": 1,
        "fewer than two rollouts": 2,
        "non-finite score": 1,
    }


def test_rewards_are_logged_as_they_are_trained():
    groups = [group(FOUR, [1.0, 0.0, 1.0, 0.0]), group(FOUR, [1.0, 1.0, 1.0, 1.0]), group(FOUR, None, dropped="x")]
    spread = statistics.stdev([1, 0, 1, 0])
    expected = {"grpo/reward": 0.75, "grpo/reward_spread": spread / 2, "grpo/no_spread": 0.5, "grpo/truncated": 0.25}
    assert flatten(reward_metrics(groups, "score")) == pytest.approx(expected)
    assert flatten(reward_metrics(groups, "mask"))["grpo/reward"] == pytest.approx((1 + 3) / 6)
    assert flatten(reward_metrics(groups, "zero"))["grpo/reward"] == pytest.approx((1 + 3) / 8)
    assert flatten(reward_metrics([], "score")) == {}


def test_a_mistake_names_its_flag():
    with pytest.raises(ValueError, match="--objective grpo learns from rollouts: add rollout to --candidates"):
        SelectionSettings("grpo", ("suffix",))
    with pytest.raises(ValueError, match="--truncated-answers must be score, mask or zero, got 'drop'"):
        replace(SelectionSettings("grpo"), truncated="drop")
    with pytest.raises(ValueError, match="--dpo-pair is for --objective dpo, got grpo"):
        SelectionSettings("grpo", fixed_roles=("suffix", "rollout"))
