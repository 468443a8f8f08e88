"""The rules of quality: Gopher's, and the paper's filter for unsafe documents.

The paper (appendix B.1, figure 12) keeps what passes five of RedPajama-V2's recommended rules, has at least five words of a
list of bad words, and stands on a domain of a blacklist. Its prose says "or" of the last two, and a comment of its code 10,000
where the code has 100,000 words: the code is what is done here by default, the others are flags.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Literal

from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.measures import OfSignals, OfText, score
from megatron_sip.corpus.rules import Document, Rule

Keep = Literal["all", "gopher", "unsafe"]
Join = Literal["and", "or"]
BAD_WORDS, BLACKLIST = "rps_doc_ldnoobw_words", "rps_doc_ut1_blacklist"


@dataclass(frozen=True, slots=True)
class Bound:
    """What a measure (a property of `measures.Measured`) must not fall below or exceed."""

    measure: str
    low: float = -inf
    high: float = inf


@dataclass(frozen=True, slots=True)
class Quality:
    """Drops a document with a measure beyond its bound, or without it: of its signals where it has them, else of its text."""

    bounds: tuple[Bound, ...]
    name: str = "quality"

    def reason(self, document: Document) -> str | None:
        """`MEASURE/low`, `MEASURE/high`, `MEASURE/missing`; `signals/missing` where there is not one signal."""
        if document.signals is not None and not document.signals:
            return "signals/missing"
        measured = OfText(document.text) if document.signals is None else OfSignals(document.signals)
        for bound in self.bounds:
            value: float | None = getattr(measured, bound.measure)
            if value is None:
                return f"{bound.measure}/missing"
            if not bound.low <= value <= bound.high:
                return f"{bound.measure}/{'low' if value < bound.low else 'high'}"
        return None


@dataclass(frozen=True, slots=True)
class UnsafeTags:
    """Drops a document whose tags do not call it unsafe: too few bad words (LDNOOBW), a domain not on UT1's blacklist."""

    min_words: float
    join: Join
    name: str = "unsafe"

    def reason(self, document: Document) -> str | None:
        """`bad_words/few`, `bad_words/missing`, `blacklist/missing`; with "or" `no_tag`."""
        signals = document.signals or {}
        words, blacklist = score(signals, BAD_WORDS), score(signals, BLACKLIST)
        if self.join == "or":
            return None if blacklist is not None or (words is not None and words >= self.min_words) else "no_tag"
        if words is None or words < self.min_words:
            return "bad_words/missing" if words is None else "bad_words/few"
        return "blacklist/missing" if blacklist is None else None


@dataclass(frozen=True, slots=True)
class QualitySettings:
    """What a filter keeps; the defaults are the paper's, and Gopher's (Rae et al. 2021, table A1) for the last three bounds."""

    keep: Keep
    min_words: float = 50
    max_words: float = 100_000
    min_word_length: float = 3
    max_word_length: float = 10
    max_symbol_ratio: float = 0.1
    max_bullet_lines: float = 0.9
    max_top_2gram: float = 0.2
    max_ellipsis_lines: float = 0.3
    max_words_without_letters: float = 0.2
    min_stop_words: float = 2
    min_unsafe_words: float = 5
    unsafe_tags: Join = "and"

    def __post_init__(self) -> None:
        """Raises CorpusError for a bound that no number, or no document, is within."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not isfinite(value):
                raise CorpusError(f"{_flag(each.name)} {value}: a number is needed")
        for low, high in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise CorpusError(f"{_flag(low)} {least} is above {_flag(high)} {most}: no document is between them")

    def rules(self) -> tuple[Rule, ...]:
        """In the order in which they are asked."""
        if self.keep == "all":
            return ()
        bounds = (
            Bound("word_count", self.min_words, self.max_words),
            Bound("word_length", self.min_word_length, self.max_word_length),
            Bound("symbol_ratio", high=self.max_symbol_ratio),
            Bound("bullet_lines", high=self.max_bullet_lines),
            Bound("top_2gram", high=self.max_top_2gram),
        )
        if self.keep == "unsafe":
            return Quality(bounds), UnsafeTags(self.min_unsafe_words, self.unsafe_tags)
        prose = (
            Bound("ellipsis_lines", high=self.max_ellipsis_lines),
            Bound("words_without_letters", high=self.max_words_without_letters),
            Bound("stop_words", self.min_stop_words),
        )
        return (Quality((*bounds, *prose)),)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
