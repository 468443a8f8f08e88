"""GRPO's branches of a judged group, and their advantages. Pure Python.

A rollout's baseline is the mean of its own group (Shao et al. 2024, section 4.1.2). Dividing by the group's spread, as there,
gives groups that are nearly all right or all wrong more weight than others (Liu et al. 2025, section 3.1): it is off unless
asked for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import Branch, Group

Truncated = Literal["score", "mask", "zero"]
"""What becomes of a rollout that was cut at the limit of its length. score: as any other. mask: it is left out, of the
baseline too. zero: its score counts as 0."""

TIE_TOLERANCE = 1e-9
"""Scores closer than this are tied: means of the same votes in another order differ by rounding."""
NO_SPREAD, TOO_FEW_ROLLOUTS = "no spread", "fewer than two rollouts"


def group_advantages(scores: Sequence[float], *, by_spread: bool = False) -> list[float] | None:
    """Each score minus their mean, with `by_spread` divided by their standard deviation; None when all are equal.

    The deviation is the sample's, with n - 1, as in TRL and verl.
    """
    if max(scores) - min(scores) <= TIE_TOLERANCE:
        return None
    mean = math.fsum(scores) / len(scores)
    scale = statistics.stdev(scores) if by_spread else 1.0
    return [(score - mean) / scale for score in scores]


def trained_rollouts(group: Group, truncated: Truncated) -> list[tuple[int, float]]:
    """(place among the candidates, score) of the rollouts of a scored group that are trained on."""
    assert group.scores is not None
    found = []
    for place, (candidate, score) in enumerate(zip(group.candidates, group.scores, strict=True)):
        if candidate.kind != "rollout" or not candidate.ids or (candidate.truncated and truncated == "mask"):
            continue
        found.append((place, 0.0 if candidate.truncated and truncated == "zero" else score))
    return found


def sampled_branches(group: Group, truncated: Truncated, *, by_spread: bool) -> list[Branch] | str:
    """The group's rollouts as branches with their advantages, or the reason why it has none to learn from.

    Candidates of other kinds are neither trained on nor part of the baseline. Equal rollouts stay apart: the policy is as
    likely to write each of them.
    """
    rollouts = trained_rollouts(group, truncated)
    if len(rollouts) < 2:
        return TOO_FEW_ROLLOUTS
    advantages = group_advantages([score for _, score in rollouts], by_spread=by_spread)
    if advantages is None:
        return NO_SPREAD
    candidates = [group.candidates[place] for place, _ in rollouts]
    return [
        Branch(candidate.ids, "sampled", candidate.kind, advantage=advantage, engine_logprobs=candidate.logprobs)
        for candidate, advantage in zip(candidates, advantages, strict=True)
    ]


def reward_metrics(groups: Sequence[Group], truncated: Truncated) -> Metrics:
    """What a step's log shows of the rewards.

    grpo/reward: mean score of the rollouts that are trained on or would be if their group had a spread;
    grpo/reward_spread: mean over groups of its standard deviation; grpo/no_spread: share of groups that have none;
    grpo/truncated: share of all rollouts that were cut at the limit of their length.
    """
    scored = [g for g in groups if g.scores is not None and g.dropped is None and all(map(math.isfinite, g.scores))]
    rewards = [[score for _, score in trained_rollouts(group, truncated)] for group in scored]
    spreads = [statistics.stdev(own) for own in rewards if len(own) > 1]
    flat = sum(max(own) - min(own) <= TIE_TOLERANCE for own in rewards if len(own) > 1)
    rollouts = [c for group in groups for c in group.candidates if c.kind == "rollout"]
    return {
        "grpo/reward": Mean(math.fsum(map(math.fsum, rewards)), sum(map(len, rewards))),
        "grpo/reward_spread": Mean(math.fsum(spreads), len(spreads)),
        "grpo/no_spread": Mean(flat, len(spreads)),
        "grpo/truncated": Mean(sum(c.truncated for c in rollouts), len(rollouts)),
    }
