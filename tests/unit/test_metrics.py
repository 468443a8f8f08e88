"""Metrics add up exactly."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.metrics import Mean, flatten, merge


@given(st.lists(st.lists(st.integers(-1000, 1000), min_size=1), min_size=1))
def test_merged_means_equal_the_mean_of_everything(parts: list[list[int]]) -> None:
    merged = merge({"score": Mean(float(sum(part)), float(len(part))), "calls": float(len(part))} for part in parts)
    everything = [value for part in parts for value in part]
    assert flatten(merged)["score"] == pytest.approx(sum(everything) / len(everything))
    assert merged["calls"] == len(everything)


def test_durations_are_those_of_the_slowest_rank() -> None:
    assert merge([{"seconds/judge": 2.0}, {"seconds/judge": 5.0}, {}]) == {"seconds/judge": 5.0}


def test_mixing_a_mean_with_a_number_is_refused() -> None:
    with pytest.raises(TypeError, match="loss"):
        merge([{"loss": 1.0}, {"loss": Mean(1.0)}])


def test_a_mean_without_weight_is_left_out() -> None:
    assert math.isnan(Mean(0.0, 0.0).value)
    assert flatten({"score/rewrite": Mean(0.0, 0.0), "groups": 3.0}) == {"groups": 3.0}


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_never_reaches_a_file(bad: float) -> None:
    assert flatten({"loss": Mean(bad, 4.0), "reward_margin": bad, "pairs": 4.0}) == {"pairs": 4.0}
