"""What continues a prefix decodes and encodes alike, whether the document, the policy or the teacher wrote it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import MULTILINGUAL, byte_level_tokenizer, metaspace_tokenizer
from tokenizers import normalizers

from megatron_sip.data.continuation_text import (
    Seam,
    continuation_texts,
    find_seam,
    ids_after,
    rollout_texts,
    text_after,
)
from megatron_sip.records import Task

BYTES, METASPACE = byte_level_tokenizer(), metaspace_tokenizer()
both_tokenizers = pytest.mark.parametrize("tokenizer", [BYTES, METASPACE], ids=["byte-level", "metaspace"])
alphabet = st.one_of(st.sampled_from(list("ab  .\n")), st.sampled_from("éя色匂🙂👩\u200d\u2028"))
documents = st.text(alphabet, min_size=2, max_size=80)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def cut_task(tokenizer, ids: list[int], start: int, cut: int, end: int) -> Task:
    prefix, suffix = ids[start:cut], ids[cut:end]
    texts = continuation_texts(tokenizer, prefix, suffix, ids[end : end + 3], cut_before=start > 0)
    return Task(0, prefix, suffix, *texts)


def task_of(tokenizer, text: str) -> Task:
    """A task whose prefix is all of `text`."""
    ids = encode(tokenizer, text)
    return Task(0, ids, [0], text, "")


# ---------------------------------------------------------------- ids to text


@both_tokenizers
@settings(max_examples=200, deadline=None)
@given(documents, st.data())
def test_equal_ids_are_equal_texts_wherever_the_document_is_cut(tokenizer, text: str, data: st.DataObject) -> None:
    ids = encode(tokenizer, text)
    cut = data.draw(st.integers(1, max(1, len(ids) - 1)))
    start, end = data.draw(st.integers(0, cut - 1)), data.draw(st.integers(cut, len(ids)))
    task = cut_task(tokenizer, ids, start, cut, end)
    seam = find_seam(tokenizer, task.prefix_ids, task.prefix_text)
    assert rollout_texts(tokenizer, task, [task.suffix_ids]) == [task.suffix_text]
    if start == 0 or task.prefix_text.strip("\ufffd"):  # else the prefix holds no whole character
        assert text_after(tokenizer, seam, task.suffix_ids) == task.suffix_text  # decoded anew, not copied


@both_tokenizers
def test_a_document_with_replacement_characters_gives_equal_texts_too(tokenizer) -> None:
    ids = encode(tokenizer, "a literal \ufffd\ufffd replacement \ufffd\ufffd\ufffd")
    for cut in range(1, len(ids)):
        for end in range(cut + 1, len(ids) + 1):
            task = cut_task(tokenizer, ids, 0, cut, end)
            assert rollout_texts(tokenizer, task, [task.suffix_ids]) == [task.suffix_text]


@both_tokenizers
@pytest.mark.parametrize("text", [*MULTILINGUAL, "  two  spaces \n\n\tlines "])
def test_the_end_of_a_long_prefix_is_enough(tokenizer, text: str) -> None:
    ids = encode(tokenizer, text * 20)
    for cut in range(len(ids) - 40, len(ids) - 20):
        for start in (0, 1, 2):
            task = cut_task(tokenizer, ids, start, cut, cut + 16)
            seam = find_seam(tokenizer, task.prefix_ids, task.prefix_text)
            assert len(seam.ids) <= 11
            assert seam.ids == task.prefix_ids[-len(seam.ids) :]
            assert text_after(tokenizer, seam, task.suffix_ids) == task.suffix_text


def test_a_rollout_keeps_its_leading_space() -> None:
    assert METASPACE.decode(encode(METASPACE, "The quick brown fox")[9:], skip_special_tokens=True) == "k brown fox"
    ids = encode(METASPACE, "The quick brown fox jumps")
    cut = len(encode(METASPACE, "The quick"))
    assert METASPACE.decode(ids[cut:], skip_special_tokens=True) == "brown fox jumps"  # what it is on its own
    task = cut_task(METASPACE, ids, 0, cut, len(ids))
    assert rollout_texts(METASPACE, task, [ids[cut:], ids[cut:-1]]) == [" brown fox jumps", " brown fox jump"]


@both_tokenizers
def test_a_rollout_that_finishes_the_prefix_s_character_shows_it_whole(tokenizer) -> None:
    ids = encode(tokenizer, "so 🙂 yes")
    inside = next(cut for cut in range(1, len(ids)) if tokenizer.decode(ids[:cut]).endswith("\ufffd"))
    task = cut_task(tokenizer, ids, 0, inside, inside + 1)
    again = ids[inside:]
    assert rollout_texts(tokenizer, task, [again])[0].strip() == "🙂 yes"
    assert "\ufffd" in rollout_texts(tokenizer, task, [encode(tokenizer, "no")])[0]  # it broke the character


@both_tokenizers
def test_a_character_that_the_token_limit_cuts_is_left_out_and_one_that_the_policy_broke_is_not(tokenizer) -> None:
    task = task_of(tokenizer, "The smile is")
    whole = ids_after(tokenizer, find_seam(tokenizer, task.prefix_ids, task.prefix_text), " here 🙂")
    assert whole is not None
    texts = rollout_texts(tokenizer, task, [whole, whole[:-1], [*whole[:-1], tokenizer.eos_token_id]])
    assert texts[:2] == [" here 🙂", " here "]
    assert texts[2].startswith(" here \ufffd")


@both_tokenizers
def test_special_tokens_of_rollouts_are_not_shown(tokenizer) -> None:
    task = task_of(tokenizer, "The fox")
    jumps = ids_after(tokenizer, find_seam(tokenizer, task.prefix_ids, task.prefix_text), " jumps")
    assert jumps is not None
    eos = tokenizer.eos_token_id
    assert rollout_texts(tokenizer, task, [[*jumps, eos], [eos]]) == [" jumps", ""]


# ---------------------------------------------------------------- text to ids


@both_tokenizers
@settings(max_examples=200, deadline=None)
@given(documents, documents.filter(lambda text: text.strip() != ""))
def test_ids_follow_the_prefix_with_exactly_the_text(tokenizer, prefix: str, text: str) -> None:
    task = task_of(tokenizer, prefix)
    ids = ids_after(tokenizer, find_seam(tokenizer, task.prefix_ids, prefix), text)
    assert ids is not None
    assert tokenizer.decode(task.prefix_ids + ids) == prefix + text


@both_tokenizers
def test_a_seam_inside_a_character_takes_only_text_that_finishes_it(tokenizer) -> None:
    ids = encode(tokenizer, "x色は")
    task = cut_task(tokenizer, ids, 0, 2, len(ids))
    assert task.prefix_text == "x"
    seam = find_seam(tokenizer, task.prefix_ids, task.prefix_text)
    assert seam.unfinished == 1 or tokenizer is METASPACE
    finished = ids_after(tokenizer, seam, "色だ")
    assert finished is not None
    assert tokenizer.decode(task.prefix_ids + finished) == "x色だ"
    if seam.unfinished:
        assert ids_after(tokenizer, seam, " other") is None


@both_tokenizers
def test_special_tokens_written_out_stay_text(tokenizer) -> None:
    text = " ends with </s> or <|eos|> here"
    ids = ids_after(tokenizer, Seam(encode(tokenizer, "It"), "It"), text)
    assert ids is not None
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode([*encode(tokenizer, "It"), *ids], skip_special_tokens=True) == "It" + text


def test_text_that_the_tokenizer_normalises_gets_the_ids_of_what_it_becomes() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    seam = find_seam(tokenizer, tokenizer.encode("The caf"), "The caf")
    ids = ids_after(tokenizer, seam, "e\u0301 is open")
    assert ids is not None
    assert text_after(tokenizer, seam, ids) == "\u00e9 is open"
