"""Rules that spoil a suffix: they always do, the same way for the same seed, in any language."""

from __future__ import annotations

import re
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import MULTILINGUAL

from megatron_sip.prepare.judgements import spaced_as
from megatron_sip.prepare.rules import RULES, names_in, pieces_of, same, spoil

PROSE = (
    " of the harbour. In 1887 the engineer Carl Lind built a bridge of 412 metres to Norwick, which Queen Ada opened. "
    "Two years later it fell. Nobody was hurt, but the Lind Company paid 30,000 crowns."
)
CHINESE = "色は匂へど散りぬるを。我が世誰ぞ常ならむ。有為の奥山今日越えて。浅き夢見じ酔ひもせず。"
TEXTS = st.one_of(st.text(), st.sampled_from([*MULTILINGUAL, PROSE, CHINESE, "a a a a a a a a", "٣٤ و ٥"]))
SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("rule", RULES)
@given(TEXTS, TEXTS, SEEDS)
def test_a_rule_changes_more_than_white_space_or_says_that_it_cannot(
    rule: str, text: str, prefix: str, seed: int
) -> None:
    spoilt = spoil(rule, text, prefix, seed)
    assert spoilt == spoil(rule, text, prefix, seed)
    if spoilt is not None:
        assert not same(spoilt, text)


@pytest.mark.parametrize("rule", ["shuffle", "swap-sentences"])
@given(TEXTS, SEEDS)
def test_rules_that_move_things_keep_every_character(rule: str, text: str, seed: int) -> None:
    spoilt = spoil(rule, text, "", seed)
    assert spoilt is None or Counter(spoilt) == Counter(text)


@given(TEXTS, SEEDS)
def test_shuffled_words_are_the_same_words(text: str, seed: int) -> None:
    spoilt = spoil("shuffle", text, "", seed)
    if spoilt is not None:
        assert Counter("".join(spoilt.split())) == Counter("".join(text.split()))
        assert [piece.isspace() for piece in pieces_of(text)][:1] == [piece.isspace() for piece in pieces_of(spoilt)][
            :1
        ]


@given(TEXTS, SEEDS)
def test_numbers_change_digits_alone(text: str, seed: int) -> None:
    spoilt = spoil("numbers", text, "", seed)
    if spoilt is not None:
        assert len(spoilt) == len(text)
        assert all(a == b or (a.isdecimal() and b.isdecimal()) for a, b in zip(text, spoilt, strict=True))


@given(TEXTS, SEEDS)
def test_a_loop_has_as_many_words_and_no_new_one(text: str, seed: int) -> None:
    spoilt = spoil("repeat", text, "", seed)
    if spoilt is not None:
        words, looped = ([p for p in pieces_of(t) if not p.isspace()] for t in (text, spoilt))
        assert len(looped) == len(words)
        assert set(looped) <= set(words)


def layout(text: str) -> tuple[str, str, Counter[str]]:
    """White space before and behind a text, and the runs of more than one space inside."""
    body = text.strip()
    before, _, behind = text.partition(body)
    return before, behind, Counter(re.findall(r"\s{2,}", body))


SPACED = st.lists(st.sampled_from(["Anna ", "Paul  ", "met ", "30 ", "\n\n", " ", "end. ", "It ", "我", "x"])).map(
    "".join
)


@pytest.mark.parametrize("rule", RULES)
@given(st.one_of(TEXTS, SPACED), SEEDS)
def test_white_space_never_tells_which_text_is_spoilt(rule: str, text: str, seed: int) -> None:
    spoilt = spoil(rule, text, "In spring the painter Zoe came.", seed)
    assert spoilt is None or layout(spoilt) == layout(text)


@given(st.one_of(TEXTS, SPACED), st.one_of(TEXTS, SPACED))
def test_nor_does_it_tell_a_teacher_s_text(original: str, written: str) -> None:
    shown, spoilt = spaced_as(original, original), spaced_as(written, original)
    assert shown.split() == original.split()
    assert spoilt.split() == written.split()
    assert spaced_as(shown, original) == shown
    if original.strip() and written.strip():
        assert layout(spoilt)[:2] == layout(shown)[:2] == layout(original)[:2]
        assert not any(re.search(r"\S[^\S\n]{2,}\S", text) for text in (shown, spoilt))


@given(TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces_of(text)) == text


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_changes_prose(rule: str) -> None:
    assert spoil(rule, PROSE, "", 1) is not None
    assert len({spoil(rule, PROSE, "", seed) for seed in range(20)}) > 1 or rule == "swap-entities"


def test_names_are_found_inside_sentences_and_exchanged() -> None:
    assert names_in(PROSE) == ["Carl Lind", "Norwick", "Queen Ada", "Lind Company"]
    spoilt = spoil("swap-entities", PROSE, "", 3)
    assert spoilt is not None
    assert set(names_in(spoilt)) <= set(names_in(PROSE)) | {"Lind Company"}
    assert names_in(spoilt) != names_in(PROSE)


def test_a_name_that_is_alone_is_replaced_by_one_from_before() -> None:
    assert spoil("swap-entities", " and then met Anna again.", "In spring the painter Paul came.", 0) == (
        " and then met Paul again."
    )
    assert spoil("swap-entities", " and then met Anna again.", "nobody else", 0) is None


@pytest.mark.parametrize("rule", ["shuffle", "swap-sentences", "repeat"])
def test_scripts_without_spaces_are_spoilt_by_character_and_sentence(rule: str) -> None:
    spoilt = spoil(rule, CHINESE, "", 5)
    assert spoilt is not None
    assert len(spoilt) == len(CHINESE)


@pytest.mark.parametrize(
    "unit", ["The bridge at Norwick is {} years old. ", "It fell{}! ", "....x{}", '."""""x{} ', "Anna{} and "]
)
@pytest.mark.parametrize("rule", RULES)
def test_a_book_is_spoilt_in_linear_time_and_memory(rule: str, unit: str) -> None:
    text = "".join(unit.format(i % 1000) for i in range(2_000))
    began = time.process_time()
    tracemalloc.start()
    spoil(rule, text, text, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * (len(text) + 100_000)
    assert time.process_time() - began < 4


def test_different_sentences_are_found_among_many_that_are_equal() -> None:
    text = "It is so. " * 500 + "It is not."
    for seed in range(5):
        spoilt = spoil("swap-sentences", text, "", seed)
        assert spoilt is not None
        assert spoilt.count("not") == 1
        assert not spoilt.endswith("not.")


def test_texts_without_anything_to_change_are_left_alone() -> None:
    assert spoil("shuffle", "one one one", "", 0) is None
    assert spoil("swap-sentences", "One sentence alone.", "", 0) is None
    assert spoil("swap-entities", "no names here", "none here", 0) is None
    assert spoil("numbers", "no digits here", "", 0) is None
    assert spoil("repeat", "too short", "", 0) is None
    assert spoil("repeat", "la la la la la la la la", "", 0) is None
