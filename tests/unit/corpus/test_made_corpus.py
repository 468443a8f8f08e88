"""The commands that make a corpus: what they keep and count, in any number of processes, killed at any moment."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from prepare_cases import files_below, run
from raw_corpus_cases import GOOD, read_kept, redpajama_rows, text_of, write_lines, write_redpajama

from megatron_sip.corpus import workers
from megatron_sip.corpus.folder import CorpusError, CorpusFolder, read_documents, shards_of
from megatron_sip.data.text_sources import read_texts
from megatron_sip.errors import DataError

PLACES = [f"2023-06/{number:04d}/en_{bucket}.json.gz" for number in (0, 1) for bucket in ("head", "middle")]
SCORES = [
    GOOD,
    GOOD | {"rps_doc_ldnoobw_words": 4.0},
    GOOD | {"rps_doc_ut1_blacklist": None},
    GOOD | {"rps_doc_word_count": 10.0},
    {name: score for name, score in GOOD.items() if name != "ccnet_nlines"},
]
DROPPED = {
    "quality/bullet_lines/missing": 4,
    "quality/word_count/low": 4,
    "unsafe/bad_words/few": 4,
    "unsafe/blacklist/missing": 4,
}


TWO_PROCESSES = """from megatron_sip.corpus import workers
from megatron_sip.prepare.__main__ import main
workers._BYTES_PER_PROCESS = 1  # the shards are small
main()
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("redpajama")
    for place in PLACES:
        write_redpajama(root, place, SCORES)
    return root / "documents"


def unsafe(shards: Path, out: Path, *more: str | Path) -> dict[str, Any]:
    words = ("--data-path", shards / "**/*.json.gz", "--out", out, "--keep", "unsafe", "--workers", "1")
    return run("redpajama", *words, *more)


def test_what_is_kept_and_dropped_adds_up_in_any_number_of_processes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = unsafe(shards, tmp_path / "one")
    monkeypatch.setattr(workers, "_BYTES_PER_PROCESS", 1)
    unsafe(shards, tmp_path / "two", "--workers", "2")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")
    assert manifest["dropped"] == DROPPED
    assert manifest["documents"] == {"read": 20, "kept": 4, "by_subset": {"en_head": 2, "en_middle": 2}}
    assert [each["name"] for each in manifest["shards"]] == ["0-en_head", "1-en_middle", "2-en_head", "3-en_middle"]
    [document, signals] = manifest["shards"][3]["inputs"]
    assert document["path"] == str(shards / PLACES[3])
    assert signals["path"].endswith("quality_signals/2023-06/0001/en_middle.signals.json.gz")
    assert read_kept(tmp_path / "one")[1] == {"id": f"{PLACES[1]}/0", "text": text_of(0), "subset": "en_middle"}
    assert unsafe(shards, tmp_path / "one") == manifest  # nothing is left to do


def test_a_corpus_is_read_by_the_trainer_and_by_the_next_command(shards: Path, tmp_path: Path) -> None:
    unsafe(shards, tmp_path / "out")
    paths = shards_of(tmp_path / "out")
    kept = read_kept(tmp_path / "out")
    texts = [text for file in paths for batch in read_texts(file.path, "text") for text in batch.texts]
    assert texts == [each["text"] for each in kept]
    assert [each.id for file in paths for each in read_documents(file.path)] == [each["id"] for each in kept]
    with pytest.raises(CorpusError, match=r"has no manifest.json"):
        shards_of(tmp_path)


def test_killed_between_and_within_shards_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    scores = [GOOD | {"rps_doc_ldnoobw_words": float(i % 11)} for i in range(800)]
    for place in PLACES:
        write_redpajama(tmp_path, place, scores)
    unsafe(tmp_path / "documents", tmp_path / "whole")
    killed = tmp_path / "killed"
    data = ("--data-path", str(tmp_path / "documents/**/*.json.gz"))
    words = ("redpajama", *data, "--keep", "unsafe", "--workers", "2", "--out", str(killed))

    def done() -> int:
        return len(list(killed.glob("shards/[!.]*")))

    def run_until(wanted: int) -> int:
        process = subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, *words], stdout=subprocess.DEVNULL)
        while process.poll() is None and done() < wanted:
            time.sleep(0.002)
        process.kill()
        return process.wait()

    for _ in range(5):  # a kill while others are being written may come too late
        shutil.rmtree(killed, ignore_errors=True)
        if run_until(1) == -signal.SIGKILL and 1 <= done() < len(PLACES):
            break
    else:
        pytest.fail("killed too late five times")
    assert run_until(len(PLACES) + 1) == 0
    assert files_below(killed) == files_below(tmp_path / "whole")
    assert not list(killed.rglob("*.partial"))


def test_other_work_and_other_files_are_refused(shards: Path, tmp_path: Path) -> None:
    unsafe(shards, tmp_path / "out")
    with pytest.raises(CorpusError, match=r"differs in settings\.quality\.unsafe_tags \('and' there, 'or' here\)"):
        unsafe(shards, tmp_path / "out", "--unsafe-tags", "or")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with pytest.raises(CorpusError, match=r"already holds mine.txt"):
        unsafe(shards, tmp_path / "notes")
    with (
        CorpusFolder.open(tmp_path / "held", {}),
        pytest.raises(CorpusError, match="another process"),
        CorpusFolder.open(tmp_path / "held", {}),
    ):
        pass


def broken_shards(tmp_path: Path) -> Path:
    """A shard with a row that is no JSON and signals that are no lists, one that is cut short, one that is whole."""
    documents, signals = redpajama_rows("2023-06/0000/en_head.json.gz", [GOOD] * 6)
    documents[1], signals[1] = '{"raw_content"', {**signals[1]}
    signals[2]["quality_signals"]["rps_doc_word_count"] = [[0, 3, "many"]]
    write_lines(tmp_path / "quality_signals/2023-06/0000/en_head.signals.json.gz", signals)
    write_lines(tmp_path / "documents/2023-06/0000/en_head.json.gz", documents)
    cut = write_redpajama(tmp_path, "2023-06/0001/en_head.json.gz", [GOOD] * 4000)
    cut.write_bytes(cut.read_bytes()[:-9])
    write_redpajama(tmp_path, "2023-06/0002/en_head.json.gz", [GOOD] * 4)
    return tmp_path / "documents"


def test_what_is_broken_ends_the_command_or_is_counted(tmp_path: Path) -> None:
    shards = broken_shards(tmp_path)
    with pytest.raises(DataError, match=r"0000/en_head.json.gz:2 is not a JSON object"):
        unsafe(shards, tmp_path / "stop")
    manifest = unsafe(shards, tmp_path / "stop", "--on-broken", "drop")  # goes on where it stopped
    assert (manifest["dropped"], manifest["broken_shards"]) == ({"broken_row": 2}, 1)
    read, kept = manifest["documents"]["read"], manifest["documents"]["kept"]
    cut = json.loads((tmp_path / "stop/shards/1-en_head.json").read_bytes())["counts"]
    assert (read, cut["broken_shards"]) == (kept + 2, 1)
    assert 0 < cut["documents/kept"] == cut["documents/read"] == read - 6 - 4
    row, score, rest = manifest["broken"]
    assert "0000/en_head.json.gz:2 is not a JSON object" in row
    assert "document 2023-06/0000/en_head.json.gz/2" in score
    assert "found 'many'" in score
    assert "0001/en_head.json.gz: cannot be decompressed after line" in rest


def test_what_is_left_of_a_shard_whose_signals_are_of_others_is_counted(tmp_path: Path) -> None:
    documents, signals = redpajama_rows("2023-06/0000/en_head.json.gz", [GOOD] * 6)
    del documents[2]
    write_lines(tmp_path / "quality_signals/2023-06/0000/en_head.signals.json.gz", signals)
    write_lines(tmp_path / "documents/2023-06/0000/en_head.json.gz", documents)
    with pytest.raises(DataError, match="not of each other"):
        unsafe(tmp_path / "documents", tmp_path / "out")
    manifest = unsafe(tmp_path / "documents", tmp_path / "out", "--on-broken", "drop")
    assert manifest["documents"] == {"read": 5, "kept": 2, "by_subset": {"en_head": 2}}
    assert (manifest["dropped"], manifest["broken_shards"]) == ({"rest_of_broken_shard": 3}, 1)


def test_a_shard_may_be_mended_until_it_is_done(tmp_path: Path) -> None:
    shards = broken_shards(tmp_path)
    with pytest.raises(DataError, match=r"0000/en_head.json.gz:2"):
        unsafe(shards, tmp_path / "out")
    write_redpajama(tmp_path, "2023-06/0000/en_head.json.gz", [GOOD] * 6)
    with pytest.raises(DataError, match=r"0001/en_head.json.gz: cannot be decompressed"):
        unsafe(shards, tmp_path / "out")
    write_redpajama(tmp_path, "2023-06/0001/en_head.json.gz", [GOOD] * 3)
    assert unsafe(shards, tmp_path / "out")["documents"]["kept"] == 13
    write_redpajama(tmp_path, "2023-06/0001/en_head.json.gz", [GOOD] * 4)
    with pytest.raises(CorpusError, match=r"0001/en_head.json.gz has changed since .*remove .*shards/1-en_head.json"):
        unsafe(shards, tmp_path / "out")
    (tmp_path / "out/shards/1-en_head.json").unlink()
    assert unsafe(shards, tmp_path / "out")["documents"]["kept"] == 14


def test_nothing_kept_is_an_error_that_says_why(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no document was kept of 20: .*'quality/word_count/high': "):
        unsafe(shards, tmp_path / "out", "--max-words", "60")


def test_slimpajama_and_text_by_gopher_s_rules(tmp_path: Path) -> None:
    records = [{"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in (text_of(1), " ", "too short")]
    path = write_lines(tmp_path / "chunk.jsonl.zst", records)
    manifest = run("slimpajama", "--data-path", path, "--out", tmp_path / "slim", "--keep", "gopher")
    assert manifest["documents"] == {"read": 3, "kept": 1, "by_subset": {"RedPajamaC4": 1}}
    assert manifest["dropped"] == {"empty": 1, "quality/word_count/low": 1}
    lines = write_lines(tmp_path / "a.jsonl", [{"body": "kept whole", "k": 1}])
    manifest = run("text", "--data-path", lines, "--out", tmp_path / "text", "--text-field", "body", "--id-field", "k")
    assert read_kept(tmp_path / "text") == [{"id": "1", "text": "kept whole", "subset": "a"}]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("text", "--min-words", "5"), "--min-words: of no effect with --keep all"),
        (("redpajama", "--keep", "gopher", "--unsafe-tags", "or"), "--unsafe-tags: of no effect with --keep gopher"),
        (("redpajama", "--keep", "unsafe", "--min-stop-words", "0"), "--min-stop-words: of no effect"),
        (("text", "--workers", "0"), "--workers 0"),
    ],
)
def test_flags_that_do_nothing_are_refused(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises((CorpusError, DataError), match=says):
        run(*words, "--data-path", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_redpajama_has_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("slimpajama", "--keep", "unsafe", "--data-path", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert "invalid choice: 'unsafe'" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 1500):
        data = write_lines(tmp_path / f"{count}.jsonl", [{"text": f"{i:04} " * 4_000} for i in range(count)])
        tracemalloc.start()
        run("text", "--data-path", data, "--out", tmp_path / f"out-{count}", "--workers", "1")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_the_manifest_says_what_made_the_corpus(shards: Path, tmp_path: Path) -> None:
    unsafe(shards, tmp_path / "out", "--max-words", "10000")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["settings"]["quality"]["max_words"] == 10_000
    assert set(manifest["versions"]) >= {"megatron_sip", "zstandard"}
