"""Which pairs a pairwise criterion asks for, and the scores that follow from the verdicts.

A schedule is asked for pairs round by round until it has none left. All of its scores are win rates in [0, 1] against
the other candidates of the group: measured ones (all pairs, pivot) or those that fitted Bradley-Terry strengths predict.
DPO needs the best and the worst candidate, RF-NLL only the best; the adaptive schedule spends its pairs accordingly.

    all_pairs        every pair, the paper's protocol; n(n-1)/2 pairs
    all_pairs_swap   the same, each vote asked in both orders
    pivot            everything against one candidate: the suffix, or a rollout drawn at random; n-1 pairs
    circulant_bt     each candidate against `degree` others, spread evenly; n*degree/2 pairs in one round
    two_ended_bt     a sparse circulant, then rounds of pairs where best and worst are undecided; `budget` pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_sip.judge.bradley_terry import FloatArray, IntArray, expected_win_rates, fit_bradley_terry
from megatron_sip.judge.settings import Objective, ScheduleSettings
from megatron_sip.samples import CandidateKind

Pair = tuple[int, int]
"""Indices of two candidates; the first is shown first where only one order is asked."""


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Verdicts so far: outcome[k] in [0, 1] says how far first[k] (shown first) was preferred to second[k]."""

    first: IntArray
    second: IntArray
    outcome: FloatArray

    @classmethod
    def empty(cls) -> Comparisons:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))

    def plus(self, verdicts: Sequence[tuple[int, int, float]]) -> Comparisons:
        if not verdicts:
            return self
        first, second, outcome = zip(*verdicts, strict=True)
        return Comparisons(
            np.concatenate([self.first, np.array(first, np.int64)]),
            np.concatenate([self.second, np.array(second, np.int64)]),
            np.concatenate([self.outcome, np.array(outcome, np.float64)]),
        )

    def appearances(self, count: int) -> IntArray:
        """Verdicts that each candidate took part in, [count]."""
        return np.bincount(self.first, minlength=count) + np.bincount(self.second, minlength=count)


@dataclass(frozen=True, slots=True)
class Field:
    """The candidates of one group as a schedule sees them.

    prior: strengths in logits known beforehand, or None. repeatable: whether asking the same pair in the same order again
    can say something new (sampled votes) or not (soft verdicts).
    """

    kinds: tuple[CandidateKind, ...]
    objective: Objective
    rng: np.random.Generator
    prior: FloatArray | None = None
    repeatable: bool = True

    @property
    def count(self) -> int:
        return len(self.kinds)


class Schedule(Protocol):
    """See the module. `both_orders`: whether each hard vote must be asked with the options in both orders.

    `balanced`: the pairs already show each candidate first as often as second and the scores take out a position bias,
    so that soft verdicts need one order only; otherwise they are read in both orders.
    """

    @property
    def both_orders(self) -> bool: ...

    @property
    def balanced(self) -> bool: ...

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        """Pairs to ask in this round; none: finished."""
        ...

    def scores(self, field: Field, history: Comparisons) -> FloatArray:
        """Win rates in [0, 1], one a candidate."""
        ...


@dataclass(frozen=True, slots=True)
class AllPairs:
    both_orders: bool = False
    balanced: bool = False

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        if round_index > 0:
            return []
        return [_shuffled((i, j), field.rng) for i in range(field.count) for j in range(i + 1, field.count)]

    def scores(self, field: Field, history: Comparisons) -> FloatArray:
        return measured_win_rates(field.count, history)


@dataclass(frozen=True, slots=True)
class Pivot:
    kind: CandidateKind = "suffix"
    both_orders: bool = False
    balanced: bool = False

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        if round_index > 0 or field.count < 2:
            return []
        suitable = [i for i, kind in enumerate(field.kinds) if kind == self.kind] or list(range(field.count))
        pivot = suitable[int(field.rng.integers(len(suitable)))]
        return [_shuffled((pivot, other), field.rng) for other in range(field.count) if other != pivot]

    def scores(self, field: Field, history: Comparisons) -> FloatArray:
        """Win rate against the pivot; the pivot itself drew with itself: 0.5."""
        pivot = int(np.argmax(history.appearances(field.count)))
        scores = measured_win_rates(field.count, history)
        scores[pivot] = 0.5
        return scores


@dataclass(frozen=True, slots=True)
class CirculantBT:
    degree: int = 6
    both_orders: bool = False
    balanced: bool = True

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        return circulant_pairs(field.count, self.degree, field.rng) if round_index == 0 else []

    def scores(self, field: Field, history: Comparisons) -> FloatArray:
        return _fitted_win_rates(field, history)


@dataclass(frozen=True, slots=True)
class TwoEndedBT:
    """Half of the budget goes to a circulant, the rest in `rounds` rounds to pairs among the candidates that posterior
    draws of the strengths put first (or last, for DPO)."""

    budget: int = 48
    rounds: int = 3
    both_orders: bool = False
    balanced: bool = True

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        count = field.count
        everything = count * (count - 1) // 2
        opening = min(everything, self.budget, count * max(1, round(self.budget / 2 / count)))
        if round_index == 0:
            return circulant_pairs(count, 2 * -(-opening // count), field.rng)[:opening]
        if round_index > self.rounds or count < 3:
            return []
        left = self.budget - opening
        share = left * round_index // self.rounds - left * (round_index - 1) // self.rounds
        return undecided_pairs(field, history, share)

    def scores(self, field: Field, history: Comparisons) -> FloatArray:
        return _fitted_win_rates(field, history)


def make_schedule(settings: ScheduleSettings) -> Schedule:
    match settings.name:
        case "all_pairs":
            return AllPairs()
        case "all_pairs_swap":
            return AllPairs(both_orders=True)
        case "pivot":
            return Pivot(settings.pivot)
        case "circulant_bt":
            return CirculantBT(settings.degree, balanced=not settings.both_orders)
        case "two_ended_bt":
            return TwoEndedBT(settings.budget, balanced=not settings.both_orders)
    raise ValueError(f"unknown schedule '{settings.name}'")


def planned_pairs(settings: ScheduleSettings, count: int) -> int:
    """Pairs that a schedule asks for in a group of `count` different candidates: for cost estimates."""
    everything = count * (count - 1) // 2
    match settings.name:
        case "pivot":
            return max(count - 1, 0)
        case "circulant_bt":
            return min(everything, count * settings.degree // 2)
        case "two_ended_bt":
            return min(settings.budget, everything) if count < 3 else settings.budget
    return everything


def circulant_pairs(count: int, degree: int, rng: np.random.Generator) -> list[Pair]:
    """Each candidate with `degree` others, shown first as often as second, at random places of a circle.

    Strides are spread over the circle so that any two candidates are few comparisons apart. All pairs when `degree`
    reaches count - 1.
    """
    if degree >= count - 1:
        return [_shuffled((i, j), rng) for i in range(count) for j in range(i + 1, count)]
    place = rng.permutation(count)
    farthest = (count - 1) // 2
    strides = _spread_strides(degree // 2, farthest)
    return [(int(place[i]), int(place[(i + stride) % count])) for stride in strides for i in range(count)]


def _spread_strides(wanted: int, farthest: int) -> list[int]:
    """`wanted` different strides in 1 .. farthest, 1 included, the others evenly apart."""
    wanted = min(wanted, farthest)
    return [1 + k * farthest // wanted for k in range(wanted)]


def undecided_pairs(field: Field, history: Comparisons, wanted: int) -> list[Pair]:
    """Pairs whose verdict would say most about who is best (and who is worst): Thompson sampling from both ends.

    Each pair is the leader of one posterior draw against the leader of the next that differs. Fewer than `wanted` when
    verdicts are not repeatable and everything that matters has been asked.
    """
    fit = fit_bradley_terry(history.first, history.second, history.outcome, field.count, prior_mean=field.prior)
    root = np.linalg.cholesky(fit.covariance + 1e-9 * np.eye(field.count))
    signs = (1.0,) if field.objective == "rf-nll" else (1.0, -1.0)
    asked = set() if field.repeatable else set(zip(history.first.tolist(), history.second.tolist(), strict=True))
    pairs: list[Pair] = []
    for k in range(wanted):
        draws = fit.strengths + field.rng.standard_normal((16, field.count)) @ root.T
        ranked = np.argsort(-signs[k % len(signs)] * draws, axis=1)
        leader = int(ranked[0, 0])
        rivals = dict.fromkeys([*ranked[1:, 0].tolist(), *ranked[0, 1:].tolist()])
        orders = [_shuffled((leader, rival), field.rng) for rival in rivals if rival != leader]
        pair = next((o for order in orders for o in (order, order[::-1]) if o not in asked), None)
        if pair is not None:
            pairs.append(pair)
            if not field.repeatable:
                asked.add(pair)
    return pairs


def measured_win_rates(count: int, history: Comparisons) -> FloatArray:
    """Mean over opponents of the mean outcome against each; 0.5 for a candidate without any verdict."""
    wins, asked = np.zeros((count, count)), np.zeros((count, count))
    np.add.at(wins, (history.first, history.second), history.outcome)
    np.add.at(wins, (history.second, history.first), 1.0 - history.outcome)
    np.add.at(asked, (history.first, history.second), 1.0)
    np.add.at(asked, (history.second, history.first), 1.0)
    rates = np.divide(wins, asked, out=np.zeros_like(wins), where=asked > 0)
    opponents = (asked > 0).sum(axis=1)
    return np.divide(rates.sum(axis=1), opponents, out=np.full(count, 0.5), where=opponents > 0)


def is_connected(count: int, history: Comparisons) -> bool:
    """Whether verdicts link all candidates, directly or through others: only then can all be compared."""
    linked = np.eye(count, dtype=bool)
    linked[history.first, history.second] = True
    linked[history.second, history.first] = True
    reached = linked[0] if count else np.zeros(0, bool)
    for _ in range(count):
        reached = linked[reached].any(axis=0)
    return bool(reached.all())


def _fitted_win_rates(field: Field, history: Comparisons) -> FloatArray:
    fit = fit_bradley_terry(history.first, history.second, history.outcome, field.count, prior_mean=field.prior)
    return expected_win_rates(fit.strengths)


def _shuffled(pair: Pair, rng: np.random.Generator) -> Pair:
    return pair if rng.random() < 0.5 else (pair[1], pair[0])
