"""Which pairs a pairwise criterion asks for, and the scores that follow from the verdicts.

A schedule is asked for pairs round by round until it has none left. All of its scores are win rates in [0, 1] against
the other candidates of the group (pivot: against the pivot): measured ones (all pairs, pivot) or those that fitted
Bradley-Terry strengths predict. Where verdicts are missing all are fitted: candidates that met different opponents cannot
be compared by how often they won. DPO needs the best and the worst candidate, RF-NLL only the best; the adaptive schedule
spends its pairs accordingly.

Judges prefer whichever option comes first. Each candidate is shown first as often as second, or once more where that
cannot be (all pairs of an even number, adaptive rounds); up to SMALL_GROUP candidates, where there is little to average
over, every pair is shown in both orders.

    all_pairs        every pair, the paper's protocol; n(n-1)/2 pairs
    all_pairs_swap   the same, each vote asked in both orders
    pivot            everything against one text: the suffix, or a rollout drawn at random; a pair a candidate
    circulant_bt     each candidate against `degree` others, spread evenly; n*degree/2 pairs in one round
    two_ended_bt     a sparse circulant, then rounds of pairs where best and worst are undecided; `budget` pairs
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_sip.judge.bradley_terry import (
    FloatArray,
    IntArray,
    expected_win_rates,
    fit_bradley_terry,
    sigmoid,
)
from megatron_sip.judge.settings import Objective, ScheduleSettings
from megatron_sip.records import CandidateKind

Pair = tuple[int, int]
"""Indices of two candidates; the first is shown first where only one order is asked."""
SMALL_GROUP = 3
"""Up to so many candidates each pair is asked in both orders, with as many votes in the one as in the other."""


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

    def among(self, kept: IntArray, count: int) -> Comparisons:
        """The verdicts about two of the candidates `kept` (of `count`), which are numbered anew in that order."""
        number = np.full(count, -1)
        number[kept] = np.arange(kept.size)
        both = (number[self.first] >= 0) & (number[self.second] >= 0)
        return Comparisons(number[self.first[both]], number[self.second[both]], self.outcome[both])


@dataclass(frozen=True, slots=True)
class Field:
    """The candidates of one group as a schedule sees them.

    prior: strengths in logits known beforehand, or None. repeatable: whether asking the same pair in the same order again
    can say something new (sampled votes) or not (soft verdicts). pivot: whom all others meet; None: drawn by the schedule.
    """

    kinds: tuple[CandidateKind, ...]
    objective: Objective
    rng: np.random.Generator
    prior: FloatArray | None = None
    repeatable: bool = True
    pivot: int | None = None

    @property
    def count(self) -> int:
        return len(self.kinds)

    def among(self, kept: IntArray) -> Field:
        """The field of the candidates `kept`, numbered anew."""
        return replace(
            self,
            kinds=tuple(self.kinds[i] for i in kept),
            prior=None if self.prior is None else self.prior[kept],
            pivot=None if self.pivot is None else int(np.flatnonzero(kept == self.pivot)[0]),
        )


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

    def scores(self, field: Field, history: Comparisons, *, complete: bool = True) -> FloatArray:
        """Win rates in [0, 1], one per candidate. complete: there are verdicts of every pair in every order asked for."""
        ...


@dataclass(frozen=True, slots=True)
class AllPairs:
    both_orders: bool = False
    balanced: bool = False

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        return balanced_pairs(field.count, field.rng) if round_index == 0 else []

    def scores(self, field: Field, history: Comparisons, *, complete: bool = True) -> FloatArray:
        return measured_win_rates(field.count, history) if complete else _fitted_win_rates(field, history)


@dataclass(frozen=True, slots=True)
class Pivot:
    kind: CandidateKind = "suffix"
    both_orders: bool = False
    balanced: bool = False

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        if round_index > 0 or field.count < 2:
            return []
        pivot = field.pivot
        if pivot is None:
            suitable = [i for i, kind in enumerate(field.kinds) if kind == self.kind] or list(range(field.count))
            pivot = suitable[int(field.rng.integers(len(suitable)))]
        others = [int(i) for i in field.rng.permutation(field.count) if i != pivot]
        return [(pivot, other) if k % 2 == 0 else (other, pivot) for k, other in enumerate(others)]

    def scores(self, field: Field, history: Comparisons, *, complete: bool = True) -> FloatArray:
        """Win rate against the pivot; the pivot itself drew with itself: 0.5."""
        pivot = int(np.argmax(history.appearances(field.count))) if field.pivot is None else field.pivot
        if complete:
            scores = measured_win_rates(field.count, history)
        else:
            strengths = _fitted_strengths(field, history)
            scores = sigmoid(strengths - strengths[pivot])
        scores[pivot] = 0.5
        return scores


@dataclass(frozen=True, slots=True)
class CirculantBT:
    degree: int = 6
    both_orders: bool = False
    balanced: bool = True

    def next_pairs(self, round_index: int, field: Field, history: Comparisons) -> list[Pair]:
        if round_index > 0:
            return []
        return circulant_pairs(field.count, self.degree, field.rng, one_order=self.balanced)

    def scores(self, field: Field, history: Comparisons, *, complete: bool = True) -> FloatArray:
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

    def scores(self, field: Field, history: Comparisons, *, complete: bool = True) -> FloatArray:
        return _fitted_win_rates(field, history)


def make_schedule(settings: ScheduleSettings) -> Schedule:
    both = settings.both_orders
    match settings.name:
        case "all_pairs":
            return AllPairs()
        case "all_pairs_swap":
            return AllPairs(both_orders=True)
        case "pivot":
            return Pivot(settings.pivot)
        case "circulant_bt":
            return CirculantBT(settings.degree, both_orders=both, balanced=not both)
        case "two_ended_bt":
            return TwoEndedBT(settings.budget, both_orders=both, balanced=not both)
    raise ValueError(f"unknown schedule '{settings.name}'")


def planned_pairs(settings: ScheduleSettings, count: int) -> int:
    """Pairs that a schedule asks for about `count` different texts, the pivot included: for cost estimates."""
    everything = count * (count - 1) // 2
    match settings.name:
        case "pivot":
            return max(count - 1, 0)
        case "circulant_bt":
            again = 0 if settings.both_orders else _across(count)
            return everything + again if settings.degree >= count - 1 else count * settings.degree // 2
        case "two_ended_bt":
            return min(settings.budget, everything) if count < 3 else settings.budget
    return everything


def votes_in_orders(schedule: Schedule, count: int, *, soft: bool, votes: int) -> tuple[int, int]:
    """Verdicts asked about a pair of a group of `count`: in the order that the schedule gives, and in the other one.

    `votes` hard ones are divided between the orders; an odd number is made even in a small group, where the odd vote would
    leave the judge's preference for the first option as noise.
    """
    small = count <= SMALL_GROUP
    if soft:
        return 1, int(small or not schedule.balanced)
    if schedule.both_orders:
        return votes, votes
    more = (votes + 1) // 2
    return more, more if small else votes // 2


def least_budget(count: int) -> int:
    """The fewest pairs that link `count` candidates."""
    return max(count - 1, 1)


def balanced_pairs(count: int, rng: np.random.Generator) -> list[Pair]:
    """All pairs, each candidate shown first as often as second; once more or less when `count` is even."""
    place = rng.permutation(count)
    across = range(count // 2 if count % 2 == 0 else 0)
    opposite = [_shuffled((int(place[i]), int(place[i + count // 2])), rng) for i in across]
    return _rotated(place, range(1, (count - 1) // 2 + 1)) + opposite


def circulant_pairs(count: int, degree: int, rng: np.random.Generator, *, one_order: bool = True) -> list[Pair]:
    """Each candidate with `degree` others, shown first as often as second, at random places of a circle.

    Strides are spread over the circle so that any two candidates are few comparisons apart. All pairs when `degree`
    reaches count - 1; if each then meets an odd number, the pairs across the circle are there in both orders, unless every
    pair is asked in both anyway (not `one_order`).
    """
    if degree >= count - 1:
        pairs = balanced_pairs(count, rng)
        again = _across(count) if one_order else 0
        return pairs + [(b, a) for a, b in pairs[len(pairs) - again :]]
    return _rotated(rng.permutation(count), _spread_strides(degree // 2, (count - 1) // 2))


def _across(count: int) -> int:
    """Pairs across the circle that all pairs need in both orders to be balanced; small groups have all in both."""
    return count // 2 if count % 2 == 0 and count > SMALL_GROUP else 0


def _rotated(place: IntArray, strides: Iterable[int]) -> list[Pair]:
    """Every place of the circle with those `strides` further on: first in as many pairs as second."""
    count = place.size
    return [(int(place[i]), int(place[(i + stride) % count])) for stride in strides for i in range(count)]


def _spread_strides(wanted: int, farthest: int) -> list[int]:
    """`wanted` different strides in 1 .. farthest, 1 included, the others evenly apart."""
    wanted = min(wanted, farthest)
    return [1 + k * farthest // wanted for k in range(wanted)]


def undecided_pairs(field: Field, history: Comparisons, wanted: int) -> list[Pair]:
    """Pairs whose verdict would say most about who is best (and who is worst): Thompson sampling from both ends.

    Each pair is the leader of one posterior draw against the leader of the next that differs. Fewer than `wanted` when
    verdicts are not repeatable and everything that matters has been asked. Candidates about whom nothing came back are left
    out: nothing is known of them, and they would get all that is left of the budget.
    """
    heard = history.appearances(field.count) > 0
    fit = fit_bradley_terry(history.first, history.second, history.outcome, field.count, prior_mean=field.prior)
    root = np.linalg.cholesky(fit.covariance + 1e-9 * np.eye(field.count))
    signs = (1.0,) if field.objective == "rf-nll" else (1.0, -1.0)
    asked = set() if field.repeatable else set(zip(history.first.tolist(), history.second.tolist(), strict=True))
    first_more = np.bincount(history.first, minlength=field.count) - np.bincount(history.second, minlength=field.count)
    pairs: list[Pair] = []
    for k in range(wanted):
        draws = fit.strengths + field.rng.standard_normal((16, field.count)) @ root.T
        ranked = np.argsort(np.where(heard, -signs[k % len(signs)] * draws, np.inf), axis=1)[:, : heard.sum()]
        if not ranked.size:
            break
        leader = int(ranked[0, 0])
        rivals = dict.fromkeys([*ranked[1:, 0].tolist(), *ranked[0, 1:].tolist()])
        orders = [_balancing((leader, rival), first_more, field.rng) for rival in rivals if rival != leader]
        pair = next((o for order in orders for o in (order, order[::-1]) if o not in asked), None)
        if pair is not None:
            pairs.append(pair)
            first_more[list(pair)] += (1, -1)
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


def largest_linked(count: int, history: Comparisons) -> IntArray:
    """The most candidates that verdicts link, directly or through others: only these can be compared. In order; of sets
    of one size that with the first candidate."""
    linked = np.eye(count, dtype=bool)
    linked[history.first, history.second] = True
    linked[history.second, history.first] = True
    for _ in range(count.bit_length()):  # paths of twice the length each time
        linked = linked @ linked
    sizes = linked.sum(axis=1)
    return np.flatnonzero(linked[np.argmax(sizes)]) if count else np.zeros(0, np.int64)


def _fitted_win_rates(field: Field, history: Comparisons) -> FloatArray:
    return expected_win_rates(_fitted_strengths(field, history))


def _fitted_strengths(field: Field, history: Comparisons) -> FloatArray:
    fit = fit_bradley_terry(history.first, history.second, history.outcome, field.count, prior_mean=field.prior)
    return fit.strengths


def _balancing(pair: Pair, first_more: IntArray, rng: np.random.Generator) -> Pair:
    """The order in which the one comes first that did so less often, for what each was second; equal: drawn."""
    a, b = pair
    return _shuffled(pair, rng) if first_more[a] == first_more[b] else pair if first_more[a] < first_more[b] else (b, a)


def _shuffled(pair: Pair, rng: np.random.Generator) -> Pair:
    return pair if rng.random() < 0.5 else (pair[1], pair[0])
