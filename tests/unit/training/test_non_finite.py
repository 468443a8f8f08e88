"""When a step is tried again, and how skipped ones are told."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.training.non_finite import MAX_OVERFLOWS, Attempt, as_ranges, worth_another


def overflow(scale: float, next_scale: float | None = None) -> Attempt:
    return Attempt("overflow", None, scale, scale / 2 if next_scale is None else next_scale)


def test_an_overflow_is_tried_again_at_each_lower_scale_but_not_for_ever() -> None:
    attempts = [overflow(2.0**16)]
    while worth_another(attempts):
        attempts.append(overflow(attempts[-1].next_scale))
    assert len(attempts) == MAX_OVERFLOWS == 10
    assert attempts[-1].scale == 2.0**7


def test_what_another_pass_cannot_change_is_not_tried_again() -> None:
    assert not worth_another([Attempt(None, 1.0, 1024.0, 1024.0)])  # updated
    assert not worth_another([overflow(1.0, 1.0)])  # a loss that is not finite, a constant or the least scale, bfloat16


@given(st.sets(st.integers(0, 60)))
def test_ranges_hold_every_number_once(numbers: set[int]) -> None:
    told = [part.split("-") for part in as_ranges(numbers).split(", ") if part]
    assert [n for run in told for n in range(int(run[0]), int(run[-1]) + 1)] == sorted(numbers)
    assert all(int(after[0]) > int(before[-1]) + 1 for before, after in pairwise(told))


def test_ranges_read_as_people_write_them() -> None:
    assert as_ranges([9, 3, 7, 8, 3]) == "3, 7-9"
