"""Held-out documents that training has too are counted, whatever files they come from, in memory that stays flat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import MULTILINGUAL, byte_level_tokenizer

from megatron_sip.data import shared_texts
from megatron_sip.data.documents import open_corpus
from megatron_sip.data.shared_texts import SharedTexts, count_shared_texts, hash_documents, hash_path
from megatron_sip.data.token_store import TokenStoreWriter
from megatron_sip.data.tokenization import DocumentEncoder, PrependBos, TokenizeSettings, tokenize_file

TOKENIZER = byte_level_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def count(data: list[str], cache: Path, split: str = "1,0,1", prepend_bos: PrependBos = "auto") -> SharedTexts:
    corpus = open_corpus(data, TOKENIZER, TokenizeSettings(cache_dir=cache, prepend_bos=prepend_bos), len(TOKENIZER))
    splits = corpus.split(split)
    found = count_shared_texts(splits["train"], splits["test"], (BOS, EOS), cache)
    texts = {
        name: [
            TOKENIZER.decode(corpus.sources[number].tokens(int(i)).tolist(), skip_special_tokens=True)
            for number in range(len(corpus.sources))
            for i in splits[name].documents(number)
        ]
        for name in ("train", "test")
    }
    assert (found.documents, found.shared) == (len(texts["test"]), sum(t in set(texts["train"]) for t in texts["test"]))
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=3), st.integers(0, 99))
def test_what_is_counted(tmp_path_factory: pytest.TempPathFactory, files: list[list[int]], salt: int) -> None:
    folder = tmp_path_factory.mktemp("texts")
    data = [
        write_texts(folder / f"{number}.jsonl", [f"text {text} of {salt}" for text in texts])
        for number, texts in enumerate(files)
    ]
    count(data, folder / "cache")
    weighted = [part for path in data for part in ("1", path)]
    count(weighted, folder / "cache", "2,0,1")


def test_splits_in_files_of_their_own_are_compared_too(tmp_path: Path) -> None:
    """As --subset has them."""
    how = TokenizeSettings(cache_dir=tmp_path / "cache")
    train, test = (
        open_corpus([write_texts(tmp_path / name, texts)], TOKENIZER, how, len(TOKENIZER)).split("1,0,0")["train"]
        for name, texts in (("train.jsonl", ["a", "b", "c"]), ("test.jsonl", ["c", "d", "a", "e"]))
    )
    found = count_shared_texts(train, test, (BOS, EOS), tmp_path / "cache")
    assert (found.documents, found.shared, found.uncounted) == (4, 2, ())


def test_text_and_token_files_are_compared_whatever_their_bos_eos_and_type(tmp_path: Path) -> None:
    texts = [f"{text} {i}" for i, text in enumerate(MULTILINGUAL * 4)]
    data = [write_texts(tmp_path / "a.jsonl", texts)]
    for name, bos, eos in (("both", "on", True), ("none", "off", False)):
        made = TokenizeSettings(append_eos=eos, prepend_bos=bos)  # type: ignore[arg-type]
        tokenize_file(tmp_path / "a.jsonl", tmp_path / name, DocumentEncoder.of(TOKENIZER, made), made)
        data.append(str(tmp_path / name))
    with TokenStoreWriter(tmp_path / "wide", np.int32) as writer:
        for ids in (TOKENIZER(text, add_special_tokens=False).input_ids for text in texts):
            writer.add(np.asarray(ids), np.asarray([len(ids)]))
    for prepend_bos in ("off", "on"):
        found = count([*data, str(tmp_path / "wide")], tmp_path / "cache", prepend_bos=prepend_bos)  # type: ignore[arg-type]
        assert found.shared > found.documents / 2
    assert not list(tmp_path.glob("*.hash"))  # nothing is written beside the user's files


def test_hashes_are_made_as_text_is_tokenised_and_once_for_other_files(tmp_path: Path, monkeypatch) -> None:
    data = [write_texts(tmp_path / "a.jsonl", [f"text {i % 7}" for i in range(40)])]
    made = TokenizeSettings()
    tokenize_file(tmp_path / "a.jsonl", tmp_path / "s", DocumentEncoder.of(TOKENIZER, made), made)
    expected = count(data, tmp_path / "cache"), count([str(tmp_path / "s")], tmp_path / "cache")
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert hash_path(entry / "tokens").stat().st_size == 8 * 40
    empty = hash_documents([np.zeros(0)])
    monkeypatch.setattr(shared_texts, "hash_documents", lambda documents: empty if len(list(documents)) == 1 else 1 / 0)
    assert (count(data, tmp_path / "cache"), count([str(tmp_path / "s")], tmp_path / "cache")) == expected
    assert expected[0] == expected[1]


def test_a_cache_entry_without_hashes_gets_them(tmp_path: Path) -> None:
    data = [write_texts(tmp_path / "a.jsonl", [f"text {i % 7}" for i in range(40)])]
    expected = count(data, tmp_path / "cache")
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    hash_path(entry / "tokens").unlink()
    assert count(data, tmp_path / "cache") == expected


def test_workers_hash_alike(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", [f"text {i}" for i in range(3000)])
    for workers in (1, 2):
        made = TokenizeSettings(workers=workers)
        encoder = DocumentEncoder.of(TOKENIZER, made)
        tokenize_file(tmp_path / "a.jsonl", tmp_path / "s", encoder, made, tmp_path / f"{workers}.hash")
    assert (tmp_path / "1.hash").read_bytes() == (tmp_path / "2.hash").read_bytes()
    assert (tmp_path / "1.hash").stat().st_size == 8 * 3000


def test_empty_documents_are_nobody_s_copy(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", np.uint16) as writer:
        writer.add(np.asarray([EOS] * 10), np.asarray([0, 1] * 10))
    corpus = open_corpus([str(tmp_path / "s")], TOKENIZER, TokenizeSettings(cache_dir=tmp_path / "cache"))
    splits = corpus.split("1,0,1")
    assert count_shared_texts(splits["train"], splits["test"], (BOS, EOS), tmp_path / "cache") == SharedTexts(0, 0)


def test_a_store_that_is_too_large_is_said_not_to_be_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TokenStoreWriter(tmp_path / "s", np.uint16) as writer:
        writer.add(np.asarray([5, 6] * 10), np.asarray([2] * 10))
    monkeypatch.setattr(shared_texts, "MAX_HASHED_BYTES", 39)
    corpus = open_corpus([str(tmp_path / "s")], TOKENIZER, TokenizeSettings(cache_dir=tmp_path / "cache"))
    splits = corpus.split("1,0,1")
    found = count_shared_texts(splits["train"], splits["test"], (BOS, EOS), tmp_path / "cache")
    assert found == SharedTexts(0, 0, (tmp_path / "s",))
    assert str(found).startswith("0 of 0 held-out documents have")
    assert f"(not counted: {tmp_path / 's'}.bin)" in str(found)


def test_a_cache_that_cannot_be_written_to_costs_the_count_and_not_the_run(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", np.uint16) as writer:
        writer.add(np.asarray([5, 6] * 10), np.asarray([2] * 10))
    (tmp_path / "cache").write_text("a file where the folder should be")
    corpus = open_corpus([str(tmp_path / "s")], TOKENIZER, TokenizeSettings(cache_dir=tmp_path / "cache"))
    splits = corpus.split("1,0,1")
    found = count_shared_texts(splits["train"], splits["test"], (BOS, EOS), tmp_path / "cache")
    assert found.uncounted == (tmp_path / "s",)


def test_what_is_said() -> None:
    assert str(SharedTexts(9, 0)) == "0 of 9 held-out documents have the same text as a training document"
    assert str(SharedTexts(9, 2)).endswith("document: the held-out comparison counts them, deduplicate the corpus")
