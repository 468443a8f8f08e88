"""Bradley-Terry strengths from pairwise verdicts, with priors and a position bias.

P(first shown is preferred) = sigmoid(s[first] - s[second] + b). Verdicts may be hard (0, 0.5 or 1) or soft (a
probability). Gaussian priors on s and b make the posterior mode unique for any data, also for a candidate that won
everything or was never compared. No randomness: equal data, equal strengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

PRIOR_SCALE = 3.0
"""Standard deviation of the priors of strengths and bias, in logits."""
_MAX_STEPS = 50
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class BradleyTerryFit:
    """Posterior mode and its Laplace approximation. strengths [n]; covariance [n, n]; position_bias in logits."""

    strengths: FloatArray
    covariance: FloatArray
    position_bias: float


def fit_bradley_terry(
    first: IntArray,
    second: IntArray,
    outcome: FloatArray,
    count: int,
    *,
    prior_mean: FloatArray | None = None,
) -> BradleyTerryFit:
    """Fit `count` strengths to verdicts: `outcome[k]` in [0, 1] says how far first[k] was preferred to second[k].

    Raises ValueError for outcomes outside [0, 1] or indices outside the candidates.
    """
    first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
    outcome = np.asarray(outcome, np.float64)
    if outcome.size and not (np.all(outcome >= 0) and np.all(outcome <= 1)):
        raise ValueError("verdicts must lie in [0, 1]")
    if first.size and not (min(first.min(), second.min()) >= 0 and max(first.max(), second.max()) < count):
        raise ValueError(f"verdicts name a candidate outside 0 .. {count - 1}")
    design = np.zeros((first.size, count + 1))
    rows = np.arange(first.size)
    design[rows, first] += 1.0
    design[rows, second] -= 1.0
    design[:, count] = 1.0
    precision = np.full(count + 1, PRIOR_SCALE**-2)
    mean = np.zeros(count + 1)
    if prior_mean is not None:
        mean[:count] = prior_mean
    solution, hessian = _newton(design, outcome, mean, precision)
    covariance: FloatArray = np.linalg.inv(hessian).astype(np.float64)[:count, :count]
    return BradleyTerryFit(solution[:count], covariance, float(solution[count]))


def _newton(
    design: FloatArray, outcome: FloatArray, mean: FloatArray, precision: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Mode and Hessian of the negative log posterior; convex, so damped Newton steps always arrive."""
    theta = mean.copy()
    value = _negative_log_posterior(theta, design, outcome, mean, precision)
    hessian = np.diag(precision)
    for _ in range(_MAX_STEPS):
        probability = sigmoid(design @ theta)
        gradient = design.T @ (probability - outcome) + precision * (theta - mean)
        hessian = (design.T * (probability * (1.0 - probability))) @ design + np.diag(precision)
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while scale > 1e-6:
            trial = theta - scale * step
            trial_value = _negative_log_posterior(trial, design, outcome, mean, precision)
            if trial_value <= value:
                break
            scale /= 2
        else:
            break
        theta, value = trial, trial_value
        if np.max(np.abs(step)) < _TOLERANCE:
            break
    return theta, hessian


def _negative_log_posterior(
    theta: FloatArray, design: FloatArray, outcome: FloatArray, mean: FloatArray, precision: FloatArray
) -> float:
    logits = design @ theta
    likelihood = np.sum(np.logaddexp(0.0, logits) - outcome * logits)
    return float(likelihood + 0.5 * np.sum(precision * (theta - mean) ** 2))


def sigmoid(x: FloatArray) -> FloatArray:
    """Logistic function, free of overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def expected_win_rates(strengths: FloatArray) -> FloatArray:
    """Mean probability of winning against each of the others, [n]: what all pairs would measure. 0.5 when alone."""
    count = strengths.size
    if count < 2:
        return np.full(count, 0.5)
    wins = sigmoid(strengths[:, None] - strengths[None, :])
    return (wins.sum(axis=1) - 0.5) / (count - 1)
