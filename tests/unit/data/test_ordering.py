"""Seeded orders: permutations are bijections that look random, blends keep their proportions at every point."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.data.ordering import Permutation, make_blend


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permutations_are_bijections_and_scalar_equals_array(size: int, seed: int) -> None:
    permutation = Permutation(size, seed)
    images = permutation.take(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))
    assert [permutation(i) for i in range(min(size, 20))] == images[:20].tolist()


def test_permutations_of_different_seeds_look_independent() -> None:
    images = np.array([Permutation(20, seed).take(np.arange(20)) for seed in range(4000)])
    counts = np.array([np.bincount(column, minlength=20) for column in images.T])  # where each position goes: 200 each
    assert (((counts - 200) ** 2 / 200).sum(axis=1) < 45).all()  # chi-square, 19 degrees of freedom: p < 0.001
    pairs = np.bincount(images[:, 0] * 20 + images[:, 1], minlength=400).reshape(20, 20)
    assert pairs[~np.eye(20, dtype=bool)].min() > 0  # no pair of neighbours is impossible


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 3000))
def test_blend_is_never_a_whole_task_off_its_share(weights: list[int], index: int) -> None:
    blend = make_blend([Fraction(w, 7) for w in weights])
    for i in (index, *range(40)):
        for count, weight in zip(blend.count_before(i), weights, strict=True):
            assert abs(count - i * weight / sum(weights)) < 1
    source, earlier = blend.locate(index)
    assert blend.count_before(index)[source] == earlier
    assert blend.count_before(index + 1)[source] == earlier + 1


def test_blend_of_awkward_weights_is_rounded_not_refused() -> None:
    blend = make_blend([Fraction("0.3333333"), Fraction("0.6666668"), Fraction("0.0000001")])
    assert sum(blend.weights) == pytest.approx(1)
    assert blend.weights[0] == pytest.approx(1 / 3, abs=2e-5)
    with pytest.raises(ValueError, match="must be positive"):
        make_blend([Fraction(1), Fraction(0)])
