"""How varied texts are, without a model: a policy that has learnt to please its judge may say the same again and again."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")
LOOP = 4
"""Words of an n-gram that no text repeats often by itself."""


SHARES = ("distinct_1", "distinct_2", "distinct_3", "repetition", "empty")
"""Of what `diversity` finds, those from 0 to 1."""


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return _WORD.findall(text.lower())


def ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """distinct-1 to -3: different n-grams per n-gram over all texts (Li et al. 2016); repetition: the mean over texts of the
    share of their 4-grams that repeat an earlier one; words: mean length; empty: share of texts without a word."""
    words = [words_of(text) for text in texts]
    values: dict[str, float] = {}
    for size in (1, 2, 3):
        found = [gram for own in words for gram in ngrams(own, size)]
        values[f"distinct_{size}"] = len(set(found)) / len(found) if found else 0.0
    looped = [1 - len(set(grams)) / len(grams) for own in words if (grams := ngrams(own, LOOP))]
    values["repetition"] = sum(looped) / len(looped) if looped else 0.0
    values["words"] = sum(map(len, words)) / max(1, len(words))
    values["empty"] = sum(not own for own in words) / max(1, len(words))
    return values
