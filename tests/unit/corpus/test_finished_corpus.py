"""A corpus that is finished: its files are those of its manifest, and the command given again changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus_cases import read_corpus, write_corpus
from prepare_cases import files_below, run, write_records

from megatron_sip.corpus import folder as corpus_folder
from megatron_sip.corpus import workers
from megatron_sip.corpus.dedup import Sketch
from megatron_sip.corpus.folder import CorpusError, CorpusFolder, writing_documents
from megatron_sip.corpus.rules import Document
from megatron_sip.data.role_corpus import files_of, role_paths
from megatron_sip.errors import DataError

SHARDS = {"0-a": ["alpha one", "alpha two"], "1-b": ["beta one", "beta two"]}


def lose(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def add(path: Path) -> None:
    shutil.copy(path, path.with_name("9-z.jsonl.zst"))


def replace(path: Path) -> None:
    """Other content of the same length."""
    path.write_bytes(bytes(path.stat().st_size))


CHANGES = [
    (lose, r"0-a.jsonl.zst is missing \(of 2 files 1\)"),
    (truncate, "0-a.jsonl.zst has another size than its corpus's manifest says"),
    (add, "9-z.jsonl.zst is not of that corpus"),
    (replace, "0-a.jsonl.zst is not what its corpus's manifest says"),
]


@pytest.mark.parametrize("command", ["dedup", "roles"])
@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_a_corpus_that_is_not_as_its_manifest_says_is_refused(
    command: str, change: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", SHARDS)
    change(corpus / "documents/0-a.jsonl.zst")
    with pytest.raises(DataError, match=says):
        run(command, "--data-path", corpus, "--out", tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(("change", "says"), CHANGES[:3])
def test_so_is_the_part_of_a_corpus_with_roles_that_is_read(
    change: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus", SHARDS)
    run("roles", "--data-path", corpus, "--out", tmp_path / "out", "--role-shares", "1", "--split", "1")
    change(tmp_path / "out/documents/policy/train/0-a.jsonl.zst")
    with pytest.raises(DataError, match=says):
        role_paths([str(tmp_path / "out")], "policy", "train")
    with pytest.raises(DataError, match=says):
        files_of(tmp_path / "out", "policy", "--role")


def test_documents_replaced_after_they_were_sketched_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus", SHARDS)
    monkeypatch.setattr(Sketch, "array", interrupted)  # killed once all are sketched
    with pytest.raises(KeyboardInterrupt):
        run("dedup", "--data-path", corpus, "--out", tmp_path / "out")
    monkeypatch.undo()
    assert len(list((tmp_path / "out/.sketches").iterdir())) == 2
    replace(corpus / "documents/1-b.jsonl.zst")
    with pytest.raises(DataError, match="another SHA-256"):
        run("dedup", "--data-path", corpus, "--out", tmp_path / "out")


def interrupted(*given: object) -> None:
    raise KeyboardInterrupt


def raw(folder: Path) -> list[Path]:
    folder.mkdir()
    return [write_records(folder / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)]) for name in ("a", "b")]


def test_a_shard_whose_documents_are_gone_is_made_again(tmp_path: Path) -> None:
    words = ("text", "--data-path", *raw(tmp_path / "raw"), "--out", tmp_path / "out")
    run(*words)
    whole = files_below(tmp_path / "out")
    for follows in (("text", *words[1:]), ("roles", "--data-path", tmp_path / "out", "--out", tmp_path / "roles")):
        run(*follows)
    roles = files_below(tmp_path / "roles")
    (tmp_path / "out/documents/1-b.jsonl.zst").unlink()
    run(*words)
    assert files_below(tmp_path / "out") == whole
    next((tmp_path / "roles").glob("documents/*/*/0-a.jsonl.zst")).unlink()
    run("roles", "--data-path", tmp_path / "out", "--out", tmp_path / "roles")
    assert files_below(tmp_path / "roles") == roles


def test_a_finished_command_given_again_by_other_versions_changes_nothing_and_half_done_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("text", "--data-path", *raw(tmp_path / "raw"), "--out", tmp_path / "out")
    commands = [
        text,
        *((name, "--data-path", tmp_path / "out", "--out", tmp_path / name) for name in ("dedup", "roles")),
    ]
    made = [run(*words) for words in commands]
    before = files_below(tmp_path)
    monkeypatch.setattr(corpus_folder, "version", lambda name: "99.0")
    assert [run(*words) for words in commands] == made
    assert files_below(tmp_path) == before
    assert set(made[0]["versions"]) >= {"megatron_sip", "datasketch", "xxhash", "numpy", "zstandard"}
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/shards/1-b.json").unlink()
    with pytest.raises(CorpusError, match=r"versions\.datasketch \('[\d.]+' there, '99\.0' here\)"):
        run(*text)


def test_touching_an_input_changes_nothing_and_changing_it_is_told(tmp_path: Path) -> None:
    first, second = raw(tmp_path / "raw")
    words = ("text", "--data-path", first, second, "--out", tmp_path / "out")
    made = run(*words)
    later = (tmp_path / "out/manifest.json").stat().st_mtime + 60
    os.utime(first, (later, later))
    assert run(*words) == made
    second.write_bytes(second.read_bytes().replace(b"b 2", b"c 2"))
    os.utime(second, (later, later))
    with pytest.raises(CorpusError, match=r"b.jsonl has changed since"):
        run(*words)


def test_other_work_is_told_by_the_setting_that_differs(tmp_path: Path) -> None:
    words = ("text", "--data-path", *raw(tmp_path / "raw"), "--keep", "gopher", "--min-word-length", "1")
    words += ("--min-stop-words", "0", "--max-words-without-letters", "1", "--min-words", "1")
    run(*words, "--out", tmp_path / "out")
    with pytest.raises(CorpusError, match=r"differs in settings\.quality\.min_words \(1\.0 there, 2\.0 here\): give"):
        run(*words, "--min-words", "2", "--out", tmp_path / "out")
    more = write_records(tmp_path / "raw/c.jsonl", [{"text": "c"}])
    with pytest.raises(CorpusError, match=rf"differs in files \(2 there, 3 here, the first other one '{more}'\): give"):
        run(*words[:4], more, *words[4:], "--out", tmp_path / "out")


def test_documents_get_roles_once(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", SHARDS)
    run("roles", "--data-path", corpus, "--out", tmp_path / "roles")
    for command in ("roles", "dedup"):
        with pytest.raises(CorpusError, match="its documents have roles already"):
            run(command, "--data-path", tmp_path / "roles", "--out", tmp_path / "again")


@pytest.mark.parametrize("command", ["dedup", "roles"])
def test_two_processes_make_what_one_makes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", {**SHARDS, "2-c": SHARDS["0-a"]})
    run(command, "--data-path", corpus, "--out", tmp_path / "one", "--workers", "1")
    monkeypatch.setattr(workers, "_BYTES_PER_PROCESS", 1)
    run(command, "--data-path", corpus, "--out", tmp_path / "two", "--workers", "2")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


@pytest.mark.parametrize("pattern", ["**/*.jsonl*", "*/*/*.zst", "**/*.json"])
def test_output_that_the_pattern_of_the_input_names_is_refused_at_once(pattern: str, tmp_path: Path) -> None:
    raw(tmp_path / "raw")
    write_records(tmp_path / "raw/c.json", [{"text": "c"}])
    with pytest.raises(CorpusError, match=r"--out .*raw/out: --data-path '.*' names the files in it"):
        run("text", "--data-path", str(tmp_path / "raw" / pattern), "--out", tmp_path / "raw/out")
    assert not (tmp_path / "raw/out").exists()
    run("text", "--data-path", str(tmp_path / "raw/*.jsonl"), "--out", tmp_path / "raw/out")


def test_opening_a_folder_removes_only_what_dead_processes_of_this_machine_left(tmp_path: Path) -> None:
    with CorpusFolder.open(tmp_path / "out", {}) as corpus:
        pass
    dead = corpus.documents("0-a").with_name(
        f".x.{os.uname().nodename}.4194305.partial"
    )  # above the greatest id there is
    other = corpus.documents("0-a").with_name(".x.another-node.4194305.partial")
    for path in (dead, other):
        path.write_text("")
    with writing_documents(corpus.documents("0-b")) as write:
        write(Document("1", "x", "y"))
        with CorpusFolder.open(tmp_path / "out", {}):
            assert not dead.exists()
            assert other.exists()
    assert [document.id for document in read_corpus(tmp_path / "out")["0-b"]] == ["1"]
