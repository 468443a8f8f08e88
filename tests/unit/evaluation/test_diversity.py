"""Diversity on texts whose n-grams can be counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.evaluation.diversity import diversity


def test_counts_by_hand() -> None:
    found = diversity(["a b a b a b", "C, d"])
    assert found["distinct_1"] == pytest.approx(5 / 9)  # a b c , d of 6 + 3
    assert found["distinct_2"] == pytest.approx(4 / 7)  # ab ba / c, ,d of 5 + 2
    assert found["distinct_3"] == pytest.approx(3 / 5)  # aba bab / c,d of 4 + 1
    assert found["repetition"] == pytest.approx(1 / 3)  # abab baba abab; the other text has no 4-gram
    assert found["words"] == pytest.approx(4.5)
    assert found["empty"] == 0


@given(st.lists(st.text(alphabet="ab .", max_size=40), max_size=5))
def test_shares_stay_shares(texts: list[str]) -> None:
    found = diversity(texts)
    assert all(0 <= value <= 1 for name, value in found.items() if name != "words")


def test_saying_it_twice_halves_what_is_distinct() -> None:
    text = "one two three four five six"
    once, twice = diversity([text]), diversity([text, text])
    assert (once["distinct_3"], twice["distinct_3"]) == (1.0, 0.5)
