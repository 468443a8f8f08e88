"""The cache of tokenised sources: found again, made once, never half-made, and clear about what is in its way."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import filelock
import pytest
from document_cases import TEXTS, TOKENIZER, stored, write_jsonl
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.data import tokenization
from megatron_sip.data.documents import open_corpus
from megatron_sip.data.token_store import TokenStoreWriter, bin_path
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeSettings, cached_tokens
from megatron_sip.errors import DataError


@pytest.fixture
def settings(tmp_path: Path) -> TokenizeSettings:
    return TokenizeSettings(cache_dir=tmp_path / "cache")


def test_a_finished_cache_is_reused_and_a_changed_source_or_setting_is_not(
    tmp_path: Path, settings: TokenizeSettings
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    encoder = DocumentEncoder.of(TOKENIZER, settings)
    prefix, report = cached_tokens(source, encoder, settings)
    written = bin_path(prefix).stat().st_mtime_ns
    assert cached_tokens(source, encoder, settings) == (prefix, report)
    assert bin_path(prefix).stat().st_mtime_ns == written
    other_tokenizer = DocumentEncoder.of(byte_level_tokenizer(300), settings)
    no_eos = DocumentEncoder.of(TOKENIZER, TokenizeSettings(append_eos=False))
    assert len({prefix, *(cached_tokens(source, e, settings)[0] for e in (other_tokenizer, no_eos))}) == 3
    write_jsonl(source, TEXTS[:2])
    assert cached_tokens(source, encoder, settings)[1].documents == 2


def test_truncation_set_on_the_callers_tokenizer_is_neither_used_nor_changed(
    tmp_path: Path, settings: TokenizeSettings
) -> None:
    tokenizer = byte_level_tokenizer()
    before = DocumentEncoder.of(tokenizer, settings).fingerprint()
    tokenizer("some text", truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert DocumentEncoder.of(tokenizer, settings).fingerprint() == before
    corpus = open_corpus([str(write_jsonl(tmp_path / "a.jsonl", [TEXTS[0]]))], tokenizer, settings)
    assert len(stored(corpus)[0]) > 3
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def test_what_a_killed_process_left_half_made_of_an_entry_is_removed(
    tmp_path: Path, settings: TokenizeSettings
) -> None:
    """In a container that is started again its number may be this process's; on another machine one may live."""
    source, encoder = write_jsonl(tmp_path / "a.jsonl", TEXTS), DocumentEncoder.of(TOKENIZER, settings)
    entry = cached_tokens(source, encoder, settings)[0].parent
    shutil.rmtree(entry)
    dead, own, other = (
        entry.with_name(f".{entry.name}.{process}.partial")
        for process in (f"{socket.gethostname()}.4194304", f"{socket.gethostname()}.{os.getpid()}", "other.4194304")
    )
    for folder in (dead, own, other):
        folder.mkdir()
        (folder / "tokens.bin").write_bytes(b"half")
    held, free = (entry.with_name(f".{name}.{socket.gethostname()}.4194304.partial") for name in ("held", "free"))
    held.mkdir()
    free.mkdir()
    with filelock.FileLock(entry.with_name("held.lock")):
        cached_tokens(source, encoder, settings)
    assert {path.name for path in settings.cache_dir.glob(".*.partial")} == {other.name, held.name}


def test_a_failed_source_leaves_no_cache_entry(tmp_path: Path, settings: TokenizeSettings) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(DataError):
        open_corpus([str(source)], TOKENIZER, settings)
    assert [path.name for path in settings.cache_dir.iterdir() if not path.name.endswith(".lock")] == []
    source.write_text('{"text": "fine"}\n')
    assert len(stored(open_corpus([str(source)], TOKENIZER, settings))) == 1


@pytest.mark.parametrize("damaged", ["report.json", "tokens.bin", "tokens.idx"])
def test_an_entry_that_a_power_cut_emptied_is_made_again(
    tmp_path: Path, settings: TokenizeSettings, damaged: str
) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    expected = stored(open_corpus([path], TOKENIZER, settings))
    (entry,) = [path for path in settings.cache_dir.iterdir() if path.is_dir()]
    (entry / damaged).write_bytes(b"")
    assert stored(open_corpus([path], TOKENIZER, settings)) == expected


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path, settings: TokenizeSettings) -> None:
    settings.cache_dir.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"a\.jsonl: its tokens cannot be kept in .*cache .*--data-cache-path"):
        open_corpus([str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], TOKENIZER, settings)


def test_a_full_disk_is_named(tmp_path: Path, settings: TokenizeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TokenStoreWriter, "add", full)
    with pytest.raises(DataError, match=r"a\.jsonl: its tokens cannot be kept in .*cache .*No space left on device"):
        open_corpus([str(write_jsonl(tmp_path / "a.jsonl", TEXTS))], TOKENIZER, settings)


def test_long_names_of_any_script_fit_a_file_system(tmp_path: Path, settings: TokenizeSettings) -> None:
    path = write_jsonl(tmp_path / ("🙂" * 60 + ".jsonl"), ["x"])
    assert len(stored(open_corpus([str(path)], TOKENIZER, settings))) == 1


def _open_together(source: str, cache: str, barrier, results) -> None:
    settings = TokenizeSettings(cache_dir=Path(cache))
    barrier.wait(60)
    results.put(stored(open_corpus([source], byte_level_tokenizer(), settings)))


def test_processes_that_start_together_agree(tmp_path: Path, settings: TokenizeSettings) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 200)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(source), str(settings.cache_dir), barrier, results)
    processes = [context.Process(target=_open_together, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 7 * 200
    assert len([path for path in settings.cache_dir.iterdir() if path.is_dir()]) == 1


def test_a_node_whose_locks_are_not_seen_loses_the_race_harmlessly(tmp_path: Path, settings: TokenizeSettings) -> None:
    """Without a common lock both tokenise; the second to finish must keep the first one's entry, which may be in use."""
    from megatron_sip.data.tokenization import _entry_path, _fill

    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    encoder = DocumentEncoder.of(TOKENIZER, settings)
    prefix, _ = cached_tokens(source, encoder, settings)
    inode = bin_path(prefix).stat().st_ino
    _fill(_entry_path(source, encoder, settings), source, encoder, settings)
    assert bin_path(prefix).stat().st_ino == inode
    assert not [path for path in settings.cache_dir.iterdir() if path.name.startswith(".")]


def test_waiting_for_another_process_ends(
    tmp_path: Path, settings: TokenizeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sip.data.tokenization import _entry_path

    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    encoder = DocumentEncoder.of(TOKENIZER, settings)
    entry = _entry_path(source, encoder, settings)
    entry.parent.mkdir(parents=True)
    monkeypatch.setattr(tokenization, "LOCK_TIMEOUT_S", 0.2)
    with (
        filelock.FileLock(entry.with_name(entry.name + ".lock")),
        pytest.raises(
            DataError, match=r"another process has been tokenising it for 0.2 s \(lock .*a\.jsonl-.*\.lock\)"
        ),
    ):
        cached_tokens(source, encoder, settings)
