"""The paper's filter for unsafe documents and Gopher's rules: on made signals against an oracle, on texts by hand."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import pytest
from raw_corpus_cases import GOOD, as_signals

from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.measures import OfSignals, OfText
from megatron_sip.corpus.quality import QualitySettings
from megatron_sip.corpus.rules import Document, first_reason

EDGES: dict[str, tuple[float, ...]] = {
    "rps_doc_word_count": (50, 10_000, 100_000),
    "rps_doc_mean_word_length": (3, 10),
    "rps_doc_symbol_to_word_ratio": (0.1,),
    "ccnet_nlines": (10,),
    "rps_doc_frac_chars_top_2gram": (0.2,),
    "rps_doc_ldnoobw_words": (5,),
}
LINES = "rps_lines_start_with_bulletpoint"


def drawn_scores(draw: random.Random) -> dict[str, Any]:
    """Mostly good; some at a bound, a hair beside it, null or missing."""
    scores = {**GOOD, "ccnet_nlines": 10.0, LINES: [1.0] * draw.choice((0, 8, 9, 10)) + [0.0] * 2}
    scores["rps_doc_ut1_blacklist"] = draw.choice((None, 0.0, 4.0))
    for name in (*EDGES, LINES):
        if draw.random() < 0.25:
            bound = draw.choice(EDGES.get(name, (0,)))
            values = (bound, math.nextafter(bound, math.inf), math.nextafter(bound, -math.inf), None, "missing")
            scores[name] = draw.choice(values)
    if draw.random() < 0.1:
        scores["rps_doc_ut1_blacklist"] = "missing"
    if isinstance(scores[LINES], float | int):
        scores[LINES] = [1.0, None, 0.0]
    if draw.random() < 0.05:
        scores["ccnet_nlines"] = 0.0
    return {name: score for name, score in scores.items() if score != "missing"}


def oracle(signals: dict[str, Any], join: Literal["and", "or"] = "and", max_words: int = 100_000) -> bool:
    """The paper's figure 12 by design.md, on the spans as they are; what it cannot compute it does not keep."""
    try:
        one = {name: spans[0][2] if spans else None for name, spans in signals.items() if name != LINES}
        quality = (
            50 <= one["rps_doc_word_count"] <= max_words
            and 3 <= one["rps_doc_mean_word_length"] <= 10
            and one["rps_doc_symbol_to_word_ratio"] <= 0.1
            and sum(line[2] for line in signals[LINES]) / one["ccnet_nlines"] <= 0.9
            and one["rps_doc_frac_chars_top_2gram"] <= 0.2
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return False
    words, listed = one.get("rps_doc_ldnoobw_words"), one.get("rps_doc_ut1_blacklist")
    tags = (words is not None and words >= 5, listed is not None)
    return quality and (all(tags) if join == "and" else any(tags))


def made_documents() -> list[Document]:
    draw = random.Random(17)
    signals = [as_signals(drawn_scores(draw)) for _ in range(1000)]
    for each in signals[::20]:
        each[draw.choice((LINES, *EDGES))] = None
    return [Document(str(i), "text", "en_head", each) for i, each in enumerate(signals)]


@pytest.mark.parametrize(("join", "max_words"), [("and", 100_000), ("or", 100_000), ("and", 10_000)])
def test_the_unsafe_filter_is_the_paper_s_on_a_thousand_records_with_every_edge(
    join: Literal["and", "or"], max_words: int
) -> None:
    rules = QualitySettings("unsafe", max_words=max_words, unsafe_tags=join).rules()
    documents = made_documents()
    kept = [first_reason(rules, document) is None for document in documents]
    assert kept == [oracle(dict(document.signals or {}), join, max_words) for document in documents]
    assert 100 < sum(kept) < 900
    reasons = {first_reason(rules, document) for document in documents}
    measures = ("word_count", "word_length", "symbol_ratio", "bullet_lines", "top_2gram")
    assert {f"quality/{name}/{why}" for name in measures for why in ("high", "missing")} <= reasons
    assert {"quality/word_count/low", "quality/word_length/low"} <= reasons
    tags = {"no_tag"} if join == "or" else {"bad_words/few", "bad_words/missing", "blacklist/missing"}
    assert {each for each in reasons if each and each.startswith("unsafe/")} == {f"unsafe/{tag}" for tag in tags}


@pytest.mark.parametrize(
    ("name", "score", "reason"),
    [
        ("rps_doc_frac_lines_end_with_ellipsis", 0.31, "quality/ellipsis_lines/high"),
        ("rps_doc_frac_no_alph_words", 0.21, "quality/words_without_letters/high"),
        ("rps_doc_stop_word_fraction", 1.4 / 400, "quality/stop_words/low"),
        ("rps_doc_stop_word_fraction", 1.6 / 400, None),
        ("rps_doc_ldnoobw_words", 0.0, None),
        ("rps_doc_ut1_blacklist", None, None),
        ("rps_doc_word_count", 49.0, "quality/word_count/low"),
    ],
)
def test_gopher_s_rules_on_signals(name: str, score: float | None, reason: str | None) -> None:
    rules = QualitySettings("gopher").rules()
    assert first_reason(rules, Document("0", "text", "s", as_signals(GOOD))) is None
    assert first_reason(rules, Document("0", "text", "s", as_signals(GOOD | {name: score}))) == reason


def test_a_document_whose_row_of_signals_is_lacking_is_counted_as_such() -> None:
    assert first_reason(QualitySettings("unsafe").rules(), Document("0", "text", "s", {})) == "quality/signals/missing"


TEXT = """# The Café-Bar: to be, or not...
• The café bar has 12 tables…
  – and that is all.
The café bar!"""


def test_a_text_is_measured_by_redpajama_s_definitions() -> None:
    """Counted by hand; é is two characters, as RedPajama decomposes it, and ‘CaféBar’ one word without its hyphen."""
    text = "the cafébar to be or not • the café bar has 12 tables… – and that is all the café bar"
    words = text.split()
    characters = sum(map(len, words)) + 3
    measured = OfText(TEXT)
    assert measured.word_count == len(words) == 21
    assert measured.word_length == pytest.approx(characters / 21)
    pieces = 12 + 8 + 6 + 4  # word by word, and each run of marks
    assert measured.symbol_ratio == pytest.approx(3 / pieces)  # #, ..., …
    assert measured.bullet_lines == 2 / 4
    assert measured.ellipsis_lines == 2 / 4
    assert measured.top_2gram == pytest.approx(2 * (3 + 5) / characters)
    without = ["#", "-", ":", ",", "...", "•", "12", "…", "–", ".", "!"]
    assert measured.words_without_letters == pytest.approx(len(without) / pieces)
    assert measured.stop_words == 7  # the x3, to, be, and, that


def test_an_empty_text_has_no_mean() -> None:
    measured = OfText("")
    assert (measured.word_count, measured.word_length, measured.bullet_lines, measured.top_2gram) == (
        0,
        None,
        None,
        0.0,
    )


def test_both_ways_to_measure_have_the_same_measures() -> None:
    names = {name for name in dir(OfText) if not name.startswith("_")}
    assert names == {name for name in dir(OfSignals) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("", None),
        ("short", "quality/word_count/low"),
        ("hashes", "quality/symbol_ratio/high"),
        ("bullets", "quality/bullet_lines/high"),
        ("repeated", "quality/top_2gram/high"),
        ("ellipses", "quality/ellipsis_lines/high"),
        ("numbers", "quality/words_without_letters/high"),
        ("foreign", "quality/stop_words/low"),
        ("letters", "quality/word_length/low"),
    ],
)
def test_gopher_s_rules_on_texts(change: str, reason: str | None) -> None:
    lines = [f"Line {i} of the report says that bridge number {i * 7} stands by the river" for i in range(20)]
    text = {
        "": "\n".join(lines),
        "short": "\n".join(lines[:3]),
        "hashes": "\n".join(line + " # # #" for line in lines),
        "bullets": "\n".join("• " + line for line in lines),
        "repeated": "buy now " * 40 + lines[0],
        "ellipses": "\n".join(line + "..." * (i % 2) for i, line in enumerate(lines)),
        "numbers": "\n".join(line + " 1 2 3" for line in lines),
        "foreign": " ".join(f"wort{i}" for i in range(100)),
        "letters": " ".join(f"{a} {b} the" for a in "abcdefghijk" for b in "lmnopqrstuv"),
    }[change]
    assert first_reason(QualitySettings("gopher").rules(), Document("0", text, "s")) == reason


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ({"min_words": math.nan}, "--min-words nan: a number is needed"),
        ({"max_words": math.inf}, "--max-words inf"),
        ({"min_words": 100.0, "max_words": 50.0}, "--min-words 100.0 is above --max-words 50.0"),
        ({"min_word_length": 11}, "--min-word-length 11 is above --max-word-length 10"),
    ],
)
def test_bounds_that_nothing_is_within_are_named(bounds: dict[str, Any], says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        QualitySettings("gopher", **bounds)
