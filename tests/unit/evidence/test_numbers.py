"""evidence/numbers.py: intervals of paired shares."""

from __future__ import annotations

import math
import statistics

import pytest

from evidence.numbers import over_seeds, paired_shares


def answers(both: int, gained: int, lost: int, none: int) -> tuple[list[bool], list[bool]]:
    return [True] * (both + gained) + [False] * (lost + none), [
        *[True] * both,
        *[False] * gained,
        *[True] * lost,
        *[False] * none,
    ]


def test_paired_shares_have_the_interval_of_newcombe_s_own_example() -> None:
    """Statistics in Medicine 17, 1998, table II: 36, 12, 2 and 0 of 50."""
    assert paired_shares(*answers(36, 12, 2, 0)) == pytest.approx(
        {"value": 0.2, "low": 0.0569, "high": 0.3404}, abs=1e-4
    )


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (4, 0)])
def test_few_changes_are_no_certain_difference(gained: int, lost: int) -> None:
    found = paired_shares(*answers(150, gained, lost, 150 - gained - lost))
    assert found["low"] < 0 < found["high"]


def test_gains_and_losses_are_mirrored() -> None:
    one, other = (paired_shares(*answers(100, *pair, 90)) for pair in ((20, 5), (5, 20)))
    assert (one["value"], one["low"]) == (-other["value"], -other["high"])


@pytest.mark.parametrize(("count", "student"), [(2, 12.706), (3, 4.303), (11, 2.228), (31, 2.042), (60, 2.001)])
def test_intervals_over_seeds_are_student_s_and_no_narrower_for_many(count: int, student: float) -> None:
    values = [float(seed % 2) for seed in range(count)]
    found = over_seeds(values)
    half = student * statistics.stdev(values) / math.sqrt(count)
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.025)
    assert found["high"] - found["value"] > 0.999 * half
