"""Documents begin with BOS where the model was trained so: once, whatever the source, and never seen as text."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from document_cases import stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import MULTILINGUAL, adding_bos, byte_level_tokenizer, metaspace_tokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import preprocess_data
import rewrite_corpus

from megatron_sip.data.continuation_text import find_seam, ids_after, text_after
from megatron_sip.data.documents import Corpus, DocumentSource, open_corpus
from megatron_sip.data.tasks import TaskMode, TaskSettings, TaskSource
from megatron_sip.data.token_store import TokenStore, TokenStoreWriter
from megatron_sip.data.tokenization import DocumentEncoder, PrependBos, TokenizeSettings
from megatron_sip.errors import DataError

PLAIN, LLAMA, LLAMA2 = byte_level_tokenizer(), adding_bos(byte_level_tokenizer()), adding_bos(metaspace_tokenizer())
TEXTS = [f"{text} {i}" for i, text in enumerate(MULTILINGUAL * 4)]
BOS = 7


def tokenize_settings(folder: Path, prepend_bos: PrependBos = "auto") -> TokenizeSettings:
    return TokenizeSettings(cache_dir=folder / "cache", prepend_bos=prepend_bos)


def write_texts(path: Path) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def write_store(prefix: Path, documents: list[list[int]]) -> Path:
    with TokenStoreWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add(np.asarray(ids), np.asarray([len(ids)]))
    return prefix


# ---------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("tokenizer", "prepend_bos", "begins"),
    [(LLAMA, "auto", True), (LLAMA2, "auto", True), (PLAIN, "auto", False), (PLAIN, "on", True), (LLAMA, "off", False)],
)
def test_auto_does_as_the_tokenizer_does(tmp_path: Path, tokenizer, prepend_bos: PrependBos, begins: bool) -> None:
    corpus = open_corpus(
        [write_texts(tmp_path / "a.jsonl")], tokenizer, tokenize_settings(tmp_path, prepend_bos), len(tokenizer)
    )
    for text, ids in zip(TEXTS, stored(corpus), strict=True):
        head = [tokenizer.bos_token_id] if begins else []
        assert ids == [*head, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def test_padding_and_truncation_of_the_callers_tokenizer_do_not_hide_it(tmp_path: Path) -> None:
    tokenizer = adding_bos(byte_level_tokenizer())
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    tokenizer("x", padding="max_length", truncation=True, max_length=9)
    assert DocumentEncoder.of(tokenizer, tokenize_settings(tmp_path)).bos == tokenizer.bos_token_id


def test_a_tokenizer_without_bos(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = None
    assert DocumentEncoder.of(tokenizer, tokenize_settings(tmp_path)).bos is None
    with pytest.raises(DataError, match=r"--prepend-bos on: the tokenizer has no BOS token; leave it at auto"):
        DocumentEncoder.of(tokenizer, tokenize_settings(tmp_path, "on"))


def test_each_choice_has_a_cache_entry_and_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl")
    prints = set()
    for choice in ("auto", "on", "off"):
        corpus = open_corpus([path], LLAMA, tokenize_settings(tmp_path, choice))
        prints.add(TaskSource(corpus, LLAMA, TaskSettings(24, 8)).fingerprint())
    assert len(prints) == 2
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 2


def test_the_flag_is_the_same_everywhere() -> None:
    import argparse

    from megatron_sip.config.flags import add_arguments

    trainer = add_arguments(argparse.ArgumentParser())
    assert trainer.get_default("prepend_bos") == "auto"
    tool = preprocess_data.parse_arguments(["--input", "a", "--tokenizer", "t", "--output-prefix", "o"])
    ahead = ["--data-path", "a", "--tokenizer", "t", "--samples", "1", "--cache", "c", "--teacher-url", "http://t"]
    assert tool.prepend_bos == rewrite_corpus.parse_arguments(ahead).prepend_bos == "auto"
    assert rewrite_corpus.parse_arguments([*ahead, "--prepend-bos", "off"]).prepend_bos == "off"


# ---------------------------------------------------------------- once


def test_text_and_what_preprocess_data_makes_of_it_give_the_same_tasks(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path / "tokenizer")
    path = write_texts(tmp_path / "a.jsonl")
    arguments = ["--input", path, "--tokenizer", str(tmp_path / "tokenizer"), "--output-prefix"]
    for choice in ("auto", "off"):
        output = str(tmp_path / choice)
        preprocess_data.preprocess(preprocess_data.parse_arguments([*arguments, output, "--prepend-bos", choice]))
        assert (TokenStore(tmp_path / choice)[0][0] == LLAMA.bos_token_id) == (choice == "auto")

    def tasks(data: str, mode: TaskMode) -> list:
        corpus = open_corpus([data], LLAMA, tokenize_settings(tmp_path))
        return TaskSource(corpus, LLAMA, TaskSettings(24, 8, mode)).tasks(0, 100)

    for mode in ("random", "stream"):
        expected = tasks(path, mode)  # type: ignore[arg-type]
        for made in ("auto", "off"):  # with a BOS in the files, and without
            assert tasks(str(tmp_path / made), mode) == expected  # type: ignore[arg-type]


bodies = st.lists(st.lists(st.integers(10, 99), max_size=40), min_size=1, max_size=8).filter(
    lambda documents: max(map(len, documents)) >= 12
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(bodies, st.data(), st.sampled_from(["random", "stream"]), st.integers(1, 4), st.integers(0, 200))
def test_a_prefix_has_one_bos_at_a_document_start_and_none_elsewhere(
    tmp_path: Path, documents: list[list[int]], data: st.DataObject, mode: TaskMode, min_prefix: int, index: int
) -> None:
    own = data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(documents), max_size=len(documents)))
    write_store(tmp_path / "s", [[BOS] * has + ids for has, ids in zip(own, documents, strict=True)])
    source = DocumentSource("s", [tmp_path / "s"], [], BOS)
    corpus = Corpus((source,), (Fraction(1),), 100)
    cut = TaskSettings(12, 4, mode, min_prefix_length=min_prefix)
    try:
        tasks = TaskSource(corpus, PLAIN, cut)
    except DataError:
        return  # stream mode with a long prefix needs more than twelve tokens
    task = tasks.task(index)
    _, number = tasks.document(index)
    ids, body = task.prefix_ids + task.suffix_ids, [BOS, *documents[number]]
    assert len(task.suffix_ids) == 4
    assert len(task.prefix_ids) <= 8
    assert ids.count(BOS) <= 1
    place = next(i for i in range(len(body)) if body[i : i + len(ids)] == ids)  # a piece of the document
    assert (ids[0] == BOS) == (place == 0)
    mixed = 0 < sum(own) < len(own)  # then a document that has its own may be one token shorter than was counted
    assert len([i for i in task.prefix_ids if i != BOS]) >= min_prefix - mixed
    assert mixed or len(task.prefix_ids) == 8 or ids[0] == BOS  # the longest prefix that is allowed


def test_reading_a_part_of_a_document_is_reading_it_whole_and_cutting(tmp_path: Path) -> None:
    source = DocumentSource("s", [write_store(tmp_path / "s", [[10, 11, 12]])], [], BOS)
    assert source.lengths.tolist() == [4]
    for start in range(5):
        for end in (None, *range(start, 8)):
            assert source.tokens(0, start, end).tolist() == [BOS, 10, 11, 12][start:end]


def test_large_stores_are_judged_by_runs_of_their_documents(tmp_path: Path) -> None:
    count = 100_000
    with TokenStoreWriter(tmp_path / "s", np.uint16) as writer:
        writer.add(np.tile([BOS, 20], count), np.full(count, 2))
    store = TokenStore(tmp_path / "s")
    assert store.begins_with(BOS)
    assert not store.begins_with(20)
    assert not TokenStore(write_store(tmp_path / "empty", [[], []])).begins_with(BOS)


# ---------------------------------------------------------------- unseen


@pytest.mark.parametrize("tokenizer", [LLAMA, LLAMA2], ids=["byte-level", "metaspace"])
def test_judge_and_rewriter_see_the_document_without_it(tmp_path: Path, tokenizer) -> None:
    path = write_texts(tmp_path / "a.jsonl")
    corpus = open_corpus([path], tokenizer, tokenize_settings(tmp_path))
    tasks = TaskSource(corpus, tokenizer, TaskSettings(64, 8))
    begun = 0
    for task in tasks.tasks(0, 60):
        _, number = tasks.document(task.index)
        assert tokenizer.bos_token not in task.prefix_text + task.suffix_text
        assert task.prefix_text + task.suffix_text in TEXTS[number]
        seam = find_seam(tokenizer, task.prefix_ids, task.prefix_text)
        assert text_after(tokenizer, seam, task.suffix_ids) == task.suffix_text
        rewritten = ids_after(tokenizer, seam, task.suffix_text)
        assert rewritten is None or tokenizer.bos_token_id not in rewritten
        if task.prefix_ids[0] == tokenizer.bos_token_id:
            begun += 1
            assert TEXTS[number].startswith(task.prefix_text)
    assert begun > 20
