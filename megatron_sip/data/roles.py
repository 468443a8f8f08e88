"""Which document is for whom: policy, judge or rewriter, and there for training, validation or test.

Decided by a hash of the document's text alone, so that no text is in two parts, whatever file it is in, and growing a corpus
or reading it again moves none. Two programs agree as long as they are given the same shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

from megatron_sip.data.ordering import hash64
from megatron_sip.errors import DataError

DocumentRole = Literal["policy", "judge", "rewriter"]
ROLES: tuple[DocumentRole, ...] = ("policy", "judge", "rewriter")
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_ROLE, _SPLIT = 1, 2  # separate the two draws of a text
_RANGE = 1 << 64


def text_key(text: str) -> int:
    """64-bit hash of a document's text, without the white space around it."""
    return int.from_bytes(
        hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=8).digest(), "little"
    )


@dataclass(frozen=True, slots=True)
class Shares:
    """Of all documents what each of ROLES gets, and of a role's documents each of SPLITS. Each sums to 1."""

    roles: tuple[Fraction, ...]
    splits: tuple[Fraction, ...]

    def role(self, key: int) -> DocumentRole:
        """Whose a document is; `key` is its `text_key`."""
        return ROLES[_place(hash64(key, _ROLE), self.roles)]

    def split(self, key: int) -> Split:
        """What a document is for."""
        return SPLITS[_place(hash64(key, _SPLIT), self.splits)]


def _place(draw: int, shares: Sequence[Fraction]) -> int:
    edge = Fraction(0)
    for place, share in enumerate(shares):
        edge += share
        if draw < edge * _RANGE:
            return place
    raise AssertionError("the shares sum to 1")


def parse_shares(given: str, flag: str, names: Sequence[str]) -> tuple[Fraction, Fraction, Fraction]:
    """Three shares that sum to 1 from weights such as "969,30,1"; one or two numbers leave the later ones empty.

    Raises DataError, which names `flag`, for anything but 1 to 3 non-negative numbers.
    """
    try:
        parts = [Fraction(part.strip()) for part in given.split(",")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or sum(parts) <= 0:
        raise DataError(f"{flag} {given!r}: expected 1 to 3 non-negative numbers for {','.join(names)} like 969,30,1")
    parts += [Fraction(0)] * (3 - len(parts))
    total = sum(parts)
    return cast("tuple[Fraction, Fraction, Fraction]", tuple(part / total for part in parts))
