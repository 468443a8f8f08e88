"""Which document is for whom: disjoint, the same at every reading, with the shares that were asked for."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.data.roles import ROLES, SPLITS, Shares, parse_shares, text_key
from megatron_sip.errors import DataError

SHARES = Shares(parse_shares("80,15,5", "--role-shares", ROLES), parse_shares("90,5,5", "--split", SPLITS))


@given(st.text(), st.sampled_from(["", " ", "\n", "\t\n "]))
def test_a_text_is_in_one_part_whatever_white_space_is_around_it(text: str, around: str) -> None:
    key = text_key(text)
    assert text_key(around + text + around) == key
    assert SHARES.role(key) in ROLES
    assert SHARES.split(key) in SPLITS


def test_parts_have_their_shares_and_roles_say_nothing_about_splits() -> None:
    keys = [text_key(f"document {i}") for i in range(20_000)]
    parts = Counter((SHARES.role(key), SHARES.split(key)) for key in keys)
    for role, of_role in zip(ROLES, SHARES.roles, strict=True):
        for split, of_split in zip(SPLITS, SHARES.splits, strict=True):
            expected = float(len(keys) * of_role * of_split)
            assert abs(parts[role, split] - expected) < 5 * expected**0.5


def test_parts_are_what_they_were() -> None:
    """A changed hash would move documents between the roles of corpora that are in use."""
    keys = [text_key(f"document {i}") for i in (4, 5, 8, 17, 27, 33)]
    assert [(SHARES.role(key), SHARES.split(key)) for key in keys] == [
        ("judge", "train"),
        ("policy", "valid"),
        ("policy", "test"),
        ("judge", "train"),
        ("rewriter", "train"),
        ("judge", "valid"),
    ]


@pytest.mark.parametrize("given_shares", ["", "1,2,3,4", "a", "-1,2", "0,0,0", "1/0"])
def test_shares_that_cannot_be_are_named(given_shares: str) -> None:
    with pytest.raises(DataError, match=r"--role-shares .*policy,judge,rewriter"):
        parse_shares(given_shares, "--role-shares", ROLES)


def test_later_shares_may_be_left_out() -> None:
    assert parse_shares("3,1", "--split", SPLITS) == (Fraction(3, 4), Fraction(1, 4), Fraction(0))
