"""Which pairs each schedule asks for, and what scores follow."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge.bradley_terry import sigmoid
from megatron_sip.judge.schedules import (
    AllPairs,
    CirculantBT,
    Comparisons,
    Field,
    Pair,
    Pivot,
    Schedule,
    TwoEndedBT,
    balanced_pairs,
    circulant_pairs,
    largest_linked,
    least_budget,
    make_schedule,
    measured_win_rates,
    planned_pairs,
    votes_in_orders,
)
from megatron_sip.judge.settings import Objective, ScheduleSettings


def play(
    schedule: Schedule, quality: np.ndarray, *, soft: bool = False, objective: Objective = "dpo", seed: int = 0
) -> tuple[list[Pair], np.ndarray]:
    """Run a schedule against a judge whose logit is the difference in quality; all pairs asked, and the scores."""
    kinds = ("suffix", *["rollout"] * (len(quality) - 1))
    field = Field(kinds, objective, np.random.default_rng(seed), repeatable=not soft)
    rng = np.random.default_rng(seed + 1)
    history, asked, round_index = Comparisons.empty(), [], 0
    while pairs := schedule.next_pairs(round_index, field, history):
        chances = [float(sigmoid(quality[a] - quality[b])) for a, b in pairs]
        outcomes = [chance if soft else float(rng.random() < chance) for chance in chances]
        history = history.plus([(a, b, outcome) for (a, b), outcome in zip(pairs, outcomes, strict=True)])
        asked, round_index = asked + pairs, round_index + 1
    return asked, schedule.scores(field, history)


@pytest.mark.parametrize("count", [2, 3, 5, 16, 17])
@pytest.mark.parametrize(
    "settings",
    [
        ScheduleSettings("all_pairs"),
        ScheduleSettings("all_pairs_swap"),
        ScheduleSettings("pivot"),
        ScheduleSettings("circulant_bt", degree=4),
        ScheduleSettings("circulant_bt", degree=6),
        ScheduleSettings("two_ended_bt", budget=40),
    ],
    ids=lambda s: f"{s.name}-{s.degree}",
)
def test_pairs_asked_are_as_many_as_planned(settings: ScheduleSettings, count: int) -> None:
    asked, scores = play(make_schedule(settings), np.linspace(-1, 1, count))
    assert all(a != b and 0 <= a < count and 0 <= b < count for a, b in asked)
    assert len(asked) == planned_pairs(settings, count)
    assert scores.shape == (count,)
    assert np.all((scores >= 0) & (scores <= 1))


def test_the_papers_counts() -> None:
    """17 candidates: 136 pairs, 680 pair verdicts with 5 votes; the pivot 16 pairs."""
    assert planned_pairs(ScheduleSettings("all_pairs"), 17) * 5 == 680
    assert planned_pairs(ScheduleSettings("pivot"), 17) == 16
    assert planned_pairs(ScheduleSettings(), 17) <= 680 / 10


def test_all_pairs_asks_each_pair_once() -> None:
    asked, _ = play(AllPairs(), np.zeros(9))
    assert sorted(tuple(sorted(pair)) for pair in asked) == [(i, j) for i in range(9) for j in range(i + 1, 9)]


@given(st.integers(8, 40), st.sampled_from([2, 4, 6]), st.integers(0, 10**6))
def test_circulant_is_regular_balanced_and_connected(count: int, degree: int, seed: int) -> None:
    pairs = circulant_pairs(count, degree, np.random.default_rng(seed))
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == count * degree // 2
    assert set(Counter(a for a, _ in pairs).values()) == {degree // 2}
    assert set(Counter(b for _, b in pairs).values()) == {degree // 2}
    assert linked(count, pairs) == list(range(count))


def linked(count: int, pairs: list[Pair]) -> list[int]:
    return largest_linked(count, Comparisons.empty().plus([(a, b, 1.0) for a, b in pairs])).tolist()


@given(st.integers(4, 24), st.sampled_from([2, 4, 6, 8, 30]), st.integers(0, 10**6))
def test_every_candidate_is_shown_first_as_often_as_second(count: int, degree: int, seed: int) -> None:
    """Also where the degree reaches all others: orders are a design, not coin flips."""
    pairs = circulant_pairs(count, degree, np.random.default_rng(seed))
    assert Counter(a for a, _ in pairs) == Counter(b for _, b in pairs)
    assert len(set(pairs)) == len(pairs) == planned_pairs(ScheduleSettings(degree=degree), count)
    if degree >= count - 1:
        assert len({frozenset(pair) for pair in pairs}) == count * (count - 1) // 2


@given(st.integers(2, 24), st.integers(0, 10**6))
def test_all_pairs_are_each_asked_once_and_balanced_where_that_can_be(count: int, seed: int) -> None:
    pairs = balanced_pairs(count, np.random.default_rng(seed))
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == count * (count - 1) // 2
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    assert {abs(first[i] - second[i]) for i in range(count)} == {1 - count % 2}


@pytest.mark.parametrize("soft", [True, False])
def test_adaptive_rounds_stay_balanced(soft: bool) -> None:
    for seed in range(20):
        asked, _ = play(TwoEndedBT(90), np.linspace(-2, 2, 16), soft=soft, seed=seed)
        first, second = Counter(a for a, _ in asked), Counter(b for _, b in asked)
        assert max(abs(first[i] - second[i]) for i in range(16)) <= 4


@pytest.mark.parametrize("name", ["all_pairs", "pivot", "circulant_bt", "two_ended_bt"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("soft", "votes"), [(True, 1), (False, 1), (False, 5)])
def test_small_groups_are_asked_in_both_orders_alike(name: str, count: int, soft: bool, votes: int) -> None:
    """With a bias of 3 logits towards the first option the best of two or three is still found."""
    schedule = make_schedule(ScheduleSettings(name))
    given_order, swapped = votes_in_orders(schedule, count, soft=soft, votes=votes)
    assert given_order == swapped == (1 if soft else (votes + 1) // 2)
    for seed in range(20):
        quality = np.random.default_rng(seed).standard_normal(count)
        field = Field(("suffix", *["rollout"] * (count - 1)), "dpo", np.random.default_rng(seed), repeatable=False)
        history = Comparisons.empty()
        for a, b in schedule.next_pairs(0, field, history):
            for first, second in ((a, b), (b, a)):
                chance = float(sigmoid(quality[first] - quality[second] + 3.0))
                history = history.plus([(first, second, chance)] * given_order)
        scores = schedule.scores(field, history)
        if name != "pivot":  # which says little about candidates on the same side of the pivot
            assert np.array_equal(np.argsort(scores), np.argsort(quality))
        assert (scores[0] > scores[1]) == (quality[0] > quality[1])


@pytest.mark.parametrize("name", ["all_pairs", "pivot"])
def test_candidates_that_lost_opponents_are_compared_by_a_fit_not_by_their_averages(name: str) -> None:
    """The best one lost its verdicts against the weak: its average is lower than another's, its strength is not."""
    quality = np.array([0.0, 1.4, 1.0, -1.0, -3.0])
    pairs = balanced_pairs(5, np.random.default_rng(0)) if name == "all_pairs" else [(0, i) for i in (1, 2, 3, 4)]
    lost = {frozenset(pair) for pair in ((1, 3), (1, 4))}
    verdicts = [(a, b, float(sigmoid(quality[a] - quality[b]))) for a, b in pairs if frozenset((a, b)) not in lost]
    history = Comparisons.empty().plus(verdicts + [(b, a, 1 - outcome) for a, b, outcome in verdicts])
    field = Field(("suffix", *["rollout"] * 4), "dpo", np.random.default_rng(0), pivot=0 if name == "pivot" else None)
    scores = make_schedule(ScheduleSettings(name)).scores(field, history, complete=False)
    assert np.array_equal(np.argsort(scores), np.argsort(quality))
    if name == "all_pairs":
        assert np.argmax(measured_win_rates(5, history)) != 1
    else:
        assert scores[0] == 0.5
        assert np.all((scores > 0.5) == (quality > 0))


@given(st.integers(2, 40))
def test_the_least_budget_links_all_candidates_and_one_less_does_not(count: int) -> None:
    for budget in (least_budget(count), least_budget(count) - 1):
        field = Field(("rollout",) * count, "dpo", np.random.default_rng(count))
        pairs = TwoEndedBT(budget).next_pairs(0, field, Comparisons.empty()) if budget else []
        assert (len(linked(count, pairs)) == count) == (budget == least_budget(count))


def test_circulant_turns_into_all_pairs_when_the_group_is_small() -> None:
    assert len(circulant_pairs(5, 6, np.random.default_rng(0))) == 10


def test_the_largest_set_of_candidates_that_verdicts_link() -> None:
    assert linked(3, [(0, 1), (2, 1)]) == [0, 1, 2]
    assert linked(4, [(2, 3), (0, 1)]) == [0, 1]
    assert linked(6, [(0, 1), (5, 4), (3, 4), (2, 3)]) == [2, 3, 4, 5]
    assert linked(33, [(i, i + 1) for i in range(32)]) == list(range(33))
    assert linked(2, []) == [0]
    assert linked(0, []) == []


def test_pivot_compares_all_with_the_suffix() -> None:
    asked, scores = play(Pivot("suffix"), np.array([0.0, 9.0, -9.0, 9.0]))
    assert all(0 in pair for pair in asked)
    assert len(asked) == 3
    np.testing.assert_allclose(scores, [0.5, 1.0, 0.0, 1.0])


def test_pivot_can_be_a_random_rollout() -> None:
    pivots = {Counter(i for pair in play(Pivot("rollout"), np.zeros(5), seed=s)[0] for i in pair).most_common(1)[0][0]
              for s in range(30)}  # fmt: skip
    assert pivots == {1, 2, 3, 4}


@pytest.mark.parametrize("objective", ["dpo", "rf-nll"])
def test_two_ended_spends_its_verdicts_at_the_ends_that_matter(objective: Objective) -> None:
    quality = np.linspace(-3, 3, 16)
    appearances = np.zeros(16)
    for seed in range(20):
        asked, _ = play(TwoEndedBT(64), quality, objective=objective, seed=seed)
        appearances += np.bincount(np.array(asked).ravel(), minlength=16)
    assert appearances[-3:].mean() > 1.3 * appearances[6:10].mean()
    if objective == "dpo":
        assert appearances[:3].mean() > 1.3 * appearances[6:10].mean()
    else:
        assert appearances[:3].mean() < appearances[6:10].mean() * 1.1


def test_soft_verdicts_are_never_asked_twice() -> None:
    asked, _ = play(TwoEndedBT(60), np.linspace(-2, 2, 6), soft=True)
    assert len(set(asked)) == len(asked) <= 30


@pytest.mark.parametrize("schedule", [AllPairs(), CirculantBT(6), TwoEndedBT(48)], ids=lambda s: type(s).__name__)
def test_a_clear_judge_is_followed(schedule: Schedule) -> None:
    quality = 0.5 * np.random.default_rng(3).permutation(np.arange(16.0))
    _, scores = play(schedule, quality, soft=True)
    assert np.argmax(scores) == np.argmax(quality)
    assert np.argmin(scores) == np.argmin(quality)


def test_win_rates_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    verdicts = [(int(a), int((a + 1 + rng.integers(4)) % 5), float(rng.random())) for a in rng.integers(5, size=30)]
    against: dict[tuple[int, int], list[float]] = {}
    for a, b, outcome in verdicts:
        against.setdefault((a, b), []).append(outcome)
        against.setdefault((b, a), []).append(1 - outcome)
    rates = measured_win_rates(6, Comparisons.empty().plus(verdicts))
    for i in range(5):
        means = [np.mean(outcomes) for (a, _), outcomes in against.items() if a == i]
        assert rates[i] == pytest.approx(np.mean(means))
    assert rates[5] == 0.5


def test_equal_seeds_ask_equal_pairs() -> None:
    for name in ("all_pairs", "pivot", "circulant_bt", "two_ended_bt"):
        schedule = make_schedule(ScheduleSettings(name))
        assert play(schedule, np.linspace(0, 1, 8), seed=4)[0] == play(schedule, np.linspace(0, 1, 8), seed=4)[0]


def test_the_default_schedule_recovers_nearly_all_with_a_tenth_of_the_calls() -> None:
    """A short form of benchmarks/judge_schedules.py: same judge model (scale 3, bias 0.5, persistent errors), 60 groups."""
    settings = ScheduleSettings()
    shares: dict[str, list[float]] = {"default": [], "full": [], "pivot": []}
    for index in range(60):
        rng = np.random.default_rng([11, index])
        quality = rng.standard_normal(16)
        noise = np.triu(rng.standard_normal((16, 16)), 1)
        logits = 3 * (quality[:, None] - quality[None, :]) + noise - noise.T + 0.5
        logits += 0.5 * rng.standard_normal((16, 16))
        for name, schedule, soft, votes in (
            ("default", make_schedule(settings), True, 1),
            ("full", AllPairs(), False, 5),
            ("pivot", Pivot("rollout"), False, 4),
        ):
            field = Field(("rollout",) * 16, "dpo", np.random.default_rng([12, index]), repeatable=not soft)
            pairs = schedule.next_pairs(0, field, Comparisons.empty())
            shown = [pair if vote % 2 == 0 else pair[::-1] for pair in pairs for vote in range(votes)]
            chances = [float(sigmoid(logits[a, b])) for a, b in shown]
            outcomes = [chance if soft else float(rng.random() < chance) for chance in chances]
            history = Comparisons.empty().plus([(a, b, o) for (a, b), o in zip(shown, outcomes, strict=True)])
            scores = schedule.scores(field, history) + 1e-9 * rng.random(16)
            gap = quality[np.argmax(scores)] - quality[np.argmin(scores)]
            shares[name].append(gap / (quality.max() - quality.min()))
    means = {name: float(np.mean(values)) for name, values in shares.items()}
    assert planned_pairs(settings, 16) <= 60
    assert means["default"] >= 0.95 * means["full"]
    assert means["default"] > means["pivot"] + 0.2
