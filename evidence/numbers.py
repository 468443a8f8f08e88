"""Shares, means over seeds and differences with their 95% intervals, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_sip.evaluation.win_rate import bootstrap_interval, wilson_interval

Estimate = dict[str, float]
"""value, low, high: a number with its 95% interval, or value alone."""

T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t at 97.5%, of 1 to 30 degrees of freedom; of more it is a little less."""


def estimate(value: float, low: float, high: float) -> Estimate:
    """Rounded to what JSON should hold."""
    return {"value": round(value, 5), "low": round(low, 5), "high": round(high, 5)}


def share(value: float, count: int) -> Estimate:
    """A share of `count` independent outcomes, with Wilson's interval."""
    return estimate(value, *wilson_interval(value, count))


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, with Student's interval; of a single one it has no interval."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return {"value": round(mean, 5)}
    half = T95[min(count - 1, len(T95)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(count)
    return estimate(mean, mean - half, mean + half)


def difference(values: Sequence[Estimate], less: Sequence[Estimate]) -> Estimate:
    """The mean over seeds of values - less, one of each a seed, which share their documents.

    To Student's half-width over seeds are added in quadrature the means of those that the estimates have over documents; of a
    single seed there is no interval.
    """
    found = over_seeds([a["value"] - b["value"] for a, b in zip(values, less, strict=True)])
    if "low" not in found:
        return found
    halves = [(found["high"] - found["low"]) / 2]
    halves += [float(np.mean([_half_width(each) for each in side])) for side in (values, less)]
    half = math.hypot(*halves)
    return estimate(found["value"], found["value"] - half, found["value"] + half)


def _half_width(found: Estimate) -> float:
    return (found["high"] - found["low"]) / 2 if "low" in found else 0.0


def mean_difference(
    after: Mapping[int, float], before: Mapping[int, float], documents: Mapping[int, str], weights: Mapping[int, float]
) -> Estimate:
    """The weighted mean over tasks of after - before, with a bootstrap over documents: paired, by the tasks' numbers."""
    tasks = sorted(after)
    changes = np.array([after[task] - before[task] for task in tasks])
    weighting = np.array([weights[task] for task in tasks])
    low, high = bootstrap_interval(changes, [documents[task] for task in tasks], 1234, weighting)
    return estimate(float(np.average(changes, weights=weighting)), low, high)


def paired_shares(after: Sequence[bool], before: Sequence[bool]) -> Estimate:
    """How much larger the share of `after` is among the same questions, with Newcombe's interval for paired shares (Statistics
    in Medicine 17, 1998, method 10): a bootstrap's is too narrow where few of them differ."""
    now, then = np.array(after, bool), np.array(before, bool)
    count, both, none = len(now), int((now & then).sum()), int((~now & ~then).sum())
    gained, lost = int((now & ~then).sum()), int((~now & then).sum())
    (a, b), (c, d) = (wilson_interval(float(one.mean()), count) for one in (now, then))
    spread = math.sqrt((both + gained) * (lost + none) * (both + lost) * (gained + none))
    product = both * none - gained * lost
    correlation = (max(product - count / 2, 0) if product > 0 else product) / spread if spread else 0.0
    value, first, second = float(now.mean() - then.mean()), float(now.mean()), float(then.mean())

    def half(own: float, other: float) -> float:
        return math.sqrt(max(own**2 - 2 * correlation * own * other + other**2, 0.0))

    return estimate(value, value - half(first - a, d - second), value + half(b - first, second - c))


def sign(found: Estimate, null: float = 0.0) -> int:
    """1 or -1 where the interval lies above or below `null`, else 0."""
    if "low" not in found:
        return 0
    return int(found["low"] > null) - int(found["high"] < null)


def percent(found: Estimate, digits: int = 0) -> str:
    """85 (76 to 94) of a share."""
    return _written(found, 100, digits)


def decimal(found: Estimate, digits: int = 3) -> str:
    """0.123 (0.100 to 0.146)."""
    return _written(found, 1, digits)


def _written(found: Estimate, scale: float, digits: int) -> str:
    value = f"{scale * found['value']:.{digits}f}"
    if "low" not in found:
        return value
    return f"{value} ({scale * found['low']:.{digits}f} to {scale * found['high']:.{digits}f})"
