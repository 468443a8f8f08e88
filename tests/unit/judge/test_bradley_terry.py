"""Bradley-Terry against an independent optimiser, and its symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from megatron_sip.judge.bradley_terry import expected_win_rates, fit_bradley_terry, sigmoid


def random_verdicts(seed: int, count: int, verdicts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.integers(count, size=verdicts)
    second = (first + 1 + rng.integers(count - 1, size=verdicts)) % count
    return first, second, rng.random(verdicts).round(int(rng.integers(0, 3)))


@pytest.mark.parametrize("seed", range(8))
def test_equals_a_general_optimiser(seed: int) -> None:
    count = 3 + seed
    first, second, outcome = random_verdicts(seed, count, 5 * count)
    prior = np.linspace(-1, 1, count) if seed % 2 else np.zeros(count)

    def negative_log_posterior(theta: np.ndarray) -> float:
        logit = theta[first] - theta[second] + theta[-1]
        likelihood = np.sum(outcome * np.log1p(np.exp(-logit)) + (1 - outcome) * np.log1p(np.exp(logit)))
        return likelihood + np.sum((theta[:-1] - prior) ** 2) / (2 * 3.0**2) + theta[-1] ** 2 / (2 * 3.0**2)

    reference = minimize(negative_log_posterior, np.zeros(count + 1), method="BFGS", options={"gtol": 1e-9}).x
    fit = fit_bradley_terry(first, second, outcome, count, prior_mean=prior)
    np.testing.assert_allclose(fit.strengths, reference[:-1], atol=2e-6)
    assert fit.position_bias == pytest.approx(reference[-1], abs=2e-6)


def test_recovers_strengths_and_bias_from_many_verdicts() -> None:
    strengths, bias = np.array([-1.5, -0.5, 0.0, 0.5, 1.5]), 0.8
    first, second = np.nonzero(~np.eye(5, dtype=bool))
    outcome = sigmoid(strengths[first] - strengths[second] + bias)
    fit = fit_bradley_terry(*(np.tile(part, 5000) for part in (first, second, outcome)), 5)
    np.testing.assert_allclose(fit.strengths - fit.strengths.mean(), strengths, atol=1e-4)
    assert fit.position_bias == pytest.approx(bias, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_renaming_candidates_renames_strengths(seed: int) -> None:
    first, second, outcome = random_verdicts(seed, 6, 20)
    rename = np.random.default_rng(seed).permutation(6)
    plain = fit_bradley_terry(first, second, outcome, 6)
    renamed = fit_bradley_terry(rename[first], rename[second], outcome, 6)
    np.testing.assert_allclose(renamed.strengths[rename], plain.strengths, atol=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_swapping_the_order_of_all_pairs_flips_only_the_bias(seed: int) -> None:
    first, second, outcome = random_verdicts(seed, 5, 20)
    plain = fit_bradley_terry(first, second, outcome, 5)
    swapped = fit_bradley_terry(second, first, 1 - outcome, 5)
    np.testing.assert_allclose(swapped.strengths, plain.strengths, atol=1e-7)
    assert swapped.position_bias == pytest.approx(-plain.position_bias, abs=1e-7)


def test_a_clean_sweep_and_no_verdicts_at_all_stay_finite() -> None:
    others = np.arange(1, 8)
    sweep = fit_bradley_terry(np.zeros(7, np.int64), others, np.ones(7), 8)
    assert np.all(np.isfinite(sweep.strengths))
    assert np.argmax(sweep.strengths) == 0
    nothing = fit_bradley_terry(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), 4)
    np.testing.assert_array_equal(nothing.strengths, np.zeros(4))


def test_equal_data_gives_equal_bits() -> None:
    data = random_verdicts(5, 9, 40)
    np.testing.assert_array_equal(fit_bradley_terry(*data, 9).strengths, fit_bradley_terry(*data, 9).strengths)


def test_win_rates_are_those_of_all_pairs() -> None:
    rates = expected_win_rates(np.array([0.0, 1.0, -2.0]))
    by_hand = (sigmoid(np.array(0.0 - 1.0)) + sigmoid(np.array(0.0 + 2.0))) / 2
    assert rates[0] == pytest.approx(float(by_hand))
    assert rates.sum() == pytest.approx(1.5)
    assert expected_win_rates(np.array([7.0])) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("first", "second", "outcome", "message"),
    [([0], [1], [1.5], "lie in"), ([0], [1], [float("nan")], "lie in"), ([0], [3], [1.0], "outside 0 .. 2")],
)
def test_impossible_verdicts_are_refused(
    first: list[int], second: list[int], outcome: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_bradley_terry(np.array(first), np.array(second), np.array(outcome), 3)
