"""What the quality rules measure of a document: read from RedPajama-V2's signals, or computed from the text as they were.

A measure that cannot be had (its signal is missing or null, a text without words has no mean length) is None.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
"""Of English, by which Gopher tells prose."""
SYMBOLS = ("#", "...", "…")
ELLIPSES = ("...", "…")
BULLETS = tuple("•‣▶◀◦■□▪▫–")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PIECES = re.compile(r"\w+|[^\w\s]+")
_LETTER = re.compile("[a-zA-Z]")
_LINES = re.compile(r"[^\n]*\n|[^\n]+$")


class Measured(Protocol):
    """The measures of a document, by the names that flags, counts and manifest give them; shares are 0..1."""

    @property
    def word_count(self) -> float | None:
        """Words, of the text in lower case and without punctuation."""

    @property
    def word_length(self) -> float | None:
        """Mean characters of these."""

    @property
    def symbol_ratio(self) -> float | None:
        """Hash signs and ellipses for each piece of the text (a word, or a run of punctuation)."""

    @property
    def bullet_lines(self) -> float | None:
        """Share of lines that begin with a bullet point."""

    @property
    def top_2gram(self) -> float | None:
        """Share of the words' characters that are in the most frequent pair of words."""

    @property
    def ellipsis_lines(self) -> float | None:
        """Share of lines that end with an ellipsis."""

    @property
    def words_without_letters(self) -> float | None:
        """Share of the pieces without a letter from a to z."""

    @property
    def stop_words(self) -> float | None:
        """Number of stop words: in a text of Gopher's eight; of signals an estimate, RedPajama's share times the words (that
        share is of pieces, which are more)."""


def score(signals: Mapping[str, Any], name: str) -> float | None:
    """A signal of the whole document, whose one span is [start, end, score]. Raises TypeError for what is no number."""
    spans = signals.get(name)
    return None if not spans else _number(spans[0][2])


def _number(value: Any) -> float | None:
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"a score must be a number or null, found {value!r}")
    return value


class OfSignals:
    """As RedPajama-V2 measured it."""

    def __init__(self, signals: Mapping[str, Any]) -> None:
        self._signals = signals

    def _score(self, name: str) -> float | None:
        return score(self._signals, name)

    @property
    def word_count(self) -> float | None:
        return self._score("rps_doc_word_count")

    @property
    def word_length(self) -> float | None:
        return self._score("rps_doc_mean_word_length")

    @property
    def symbol_ratio(self) -> float | None:
        return self._score("rps_doc_symbol_to_word_ratio")

    @property
    def bullet_lines(self) -> float | None:
        """Of `ccnet_nlines`, as in RedPajama's own example of its rules; None where any line has no score."""
        lines, count = self._signals.get("rps_lines_start_with_bulletpoint"), self._score("ccnet_nlines")
        scores = None if lines is None else [_number(line[2]) for line in lines]
        if scores is None or None in scores or not count:
            return None
        return sum(each for each in scores if each is not None) / count

    @property
    def top_2gram(self) -> float | None:
        return self._score("rps_doc_frac_chars_top_2gram")

    @property
    def ellipsis_lines(self) -> float | None:
        return self._score("rps_doc_frac_lines_end_with_ellipsis")

    @property
    def words_without_letters(self) -> float | None:
        return self._score("rps_doc_frac_no_alph_words")

    @property
    def stop_words(self) -> float | None:
        share, count = self._score("rps_doc_stop_word_fraction"), self.word_count
        return None if share is None or count is None else round(share * count)


class OfText:
    """As RedPajama-V2 would have measured it (its definitions of words, pieces and lines), but for the list of stop words."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _words(self) -> list[str]:
        return unicodedata.normalize("NFD", self._text.translate(_PUNCTUATION).lower()).split()

    @cached_property
    def _pieces(self) -> list[str]:
        return _PIECES.findall(self._text)

    @cached_property
    def _lines(self) -> list[str]:
        return [line.strip() for line in _LINES.findall(self._text)]

    @cached_property
    def word_count(self) -> float:
        return len(self._words)

    @property
    def word_length(self) -> float | None:
        return _share(sum(map(len, self._words)), len(self._words))

    @property
    def symbol_ratio(self) -> float | None:
        return _share(sum(map(self._text.count, SYMBOLS)), len(self._pieces))

    @property
    def bullet_lines(self) -> float | None:
        return _share(sum(line.startswith(BULLETS) for line in self._lines), len(self._lines))

    @property
    def top_2gram(self) -> float | None:
        most = Counter(pairwise(self._words)).most_common(1)
        if not most or most[0][1] == 1:
            return 0.0
        (pair, count) = most[0]
        return _share(count * sum(map(len, pair)), sum(map(len, self._words)))

    @property
    def ellipsis_lines(self) -> float | None:
        return _share(sum(line.endswith(ELLIPSES) for line in self._lines), len(self._lines))

    @property
    def words_without_letters(self) -> float | None:
        return _share(sum(_LETTER.search(piece) is None for piece in self._pieces), len(self._pieces))

    @property
    def stop_words(self) -> float:
        return sum(word in STOP_WORDS for word in self._words)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
