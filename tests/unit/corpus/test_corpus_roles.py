"""`roles`: every document is for one role and one split; who reads which, and what is no corpus with roles."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import pytest
from corpus_cases import read_corpus, write_corpus
from killed_commands import kills_survived
from prepare_cases import files_below, prose, read_lines, run
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.data.documents import open_splits
from megatron_sip.data.role_corpus import role_paths
from megatron_sip.data.roles import ROLES, SPLITS, DocumentRole
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.errors import DataError
from megatron_sip.evaluate import command_line
from megatron_sip.evaluation.commands.generate import open_split
from megatron_sip.prepare.settings import PrepareError

SHARES = ("--role-shares", "2,1,1", "--split", "2,1,1")
TOKENIZER = byte_level_tokenizer()
COUNT = 90


def corpus(folder: Path, count: int = COUNT) -> Path:
    return write_corpus(folder, {"a": [prose(i) for i in range(40)], "b": [prose(i) for i in range(40, count)]})


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roles")
    run("roles", "--data-path", corpus(folder / "corpus"), *SHARES, "--out", folder / "out")
    return folder / "out"


def texts(divided: Path) -> dict[tuple[str, str], set[str]]:
    """Of each role and split."""
    found: dict[tuple[str, str], set[str]] = {(role, split): set() for role in ROLES for split in SPLITS}
    for name, documents in read_corpus(divided).items():
        role, split, _ = name.split("/")
        found[role, split] |= {document.text for document in documents}
    return found


def test_roles_and_splits_share_no_document_and_together_have_them_all(divided: Path) -> None:
    found = texts(divided)
    assert all(found.values())
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == COUNT
    assert set().union(*found.values()) == {prose(i) for i in range(COUNT)}
    manifest = json.loads((divided / "manifest.json").read_text())
    assert manifest["documents"]["by_role"] == {f"{role}/{split}": len(own) for (role, split), own in found.items()}
    assert manifest["settings"]["role_shares"] == {"policy": "1/2", "judge": "1/4", "rewriter": "1/4"}
    assert sum(manifest["documents"]["by_subset"].values()) == COUNT


def test_more_documents_move_none(divided: Path, tmp_path: Path) -> None:
    run("roles", "--data-path", corpus(tmp_path / "corpus", COUNT + 30), *SHARES, "--out", tmp_path / "out")
    grown = texts(tmp_path / "out")
    assert all(own < grown[part] or own == grown[part] for part, own in texts(divided).items())


def test_killed_anywhere_it_ends_with_the_same_bytes(divided: Path, tmp_path: Path) -> None:
    words = ("roles", "--data-path", divided.parent / "corpus", *SHARES, "--out", tmp_path / "killed")
    assert kills_survived(*words) >= 4
    assert files_below(tmp_path / "killed") == files_below(divided)


def test_judge_and_rewriter_read_their_own_documents_in_the_corpus_s_splits(divided: Path, tmp_path: Path) -> None:
    found = texts(divided)
    rules = ("--task", "quality", "--corrupt", "shuffle", "--no-cut")
    manifest = run("judgements", *rules, "--data-path", divided, "--out", tmp_path / "judgements")
    judged = read_lines(tmp_path / "judgements" / "judgements.jsonl")
    for split in SPLITS:
        assert {one["suffix"] for one in judged if one["split"] == split} == found["judge", split]
    assert {one["subset"] for one in judged} == {"a-subset/shuffle", "b-subset/shuffle"}
    assert set(manifest["documents"]["by_role"]) == {"judge"}
    with pytest.raises(PrepareError, match="--split, --subset-field: of no effect with a corpus folder"):
        run("judgements", *rules, "--data-path", divided, "--split", "1,0,0", "--subset-field", "x", "--out", tmp_path)
    with pytest.raises(PrepareError, match="read by itself"):
        run("judgements", *rules, "--data-path", divided, divided, "--out", tmp_path)


def opened(folder: Path | str, cache: Path, subset: DocumentRole = "policy") -> dict[str, TaskSource]:
    settings = TokenizeSettings(cache_dir=cache)
    splits = open_splits(SPLITS, [str(folder)], None, subset, TOKENIZER, settings)
    tasks = TaskSettings(seq_length=2048, suffix_length=8, min_prefix_length=8, mode="stream", seed=1)
    return {name: TaskSource(corpus, TOKENIZER, tasks) for name, corpus in splits.items()}


def test_the_trainer_s_splits_are_the_corpus_s(divided: Path, tmp_path: Path) -> None:
    found = texts(divided)
    for split, tasks in opened(divided, tmp_path).items():
        report = tasks.report()
        assert (report["split"], report["documents"]) == (split, len(found["policy", split]))
        seen = {task.prefix_text + task.suffix_text for task in tasks.tasks(0, tasks.tasks_per_epoch[0])}
        assert {
            max((text for text in found["policy", split] if text.startswith(one)), default="") for one in seen
        } == found["policy", split]


def test_a_corpus_that_grew_is_another_one_for_a_run_that_goes_on(divided: Path, tmp_path: Path) -> None:
    run("roles", "--data-path", corpus(tmp_path / "corpus", COUNT + 30), *SHARES, "--out", tmp_path / "out")
    before = opened(divided, tmp_path / "cache")["train"].fingerprint()
    assert opened(divided, tmp_path / "cache")["train"].fingerprint() == before
    assert opened(tmp_path / "out", tmp_path / "cache")["train"].fingerprint() != before
    assert opened(divided, tmp_path / "cache", "judge")["train"].fingerprint() != before


def test_evaluation_reads_the_same_parts(divided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenizeSettings, "__init__", partialmethod(TokenizeSettings.__init__, cache_dir=tmp_path))
    words = [
        "nll",
        "--model",
        "m",
        "--output",
        "o",
        "--data-path",
        str(divided),
        "--subset",
        "judge",
        "--part",
        "valid",
    ]
    given = command_line().parse_args(words)
    assert len(open_split(given, TOKENIZER).sources[0]) == len(texts(divided)["judge", "valid"])


def test_weights_stand_before_folders(divided: Path, tmp_path: Path) -> None:
    (tmp_path / "a[1]").symlink_to(divided)
    settings = TokenizeSettings(cache_dir=tmp_path / "cache")
    paths = ["0.5", str(divided), "1", str(tmp_path / "a[1]")]
    assert role_paths(paths, "policy", "test")[::2] == ["0.5", "1"]
    with pytest.raises(DataError, match="--split 9,1: with --subset"):
        open_splits(["train"], paths, "9,1", "policy", TOKENIZER, settings)
    with pytest.raises(DataError, match="is in both"):  # the same files: the pattern finds them behind brackets, too
        open_splits(["train"], paths, None, "policy", TOKENIZER, settings)


def test_a_side_source_without_held_out_documents_is_left_out_of_what_is_measured(
    divided: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("roles", "--data-path", write_corpus(tmp_path / "c", {"a": ["x", "y"]}), "--role-shares", "1", "--split", "1,0,0",
        "--out", tmp_path / "side")  # fmt: skip
    caplog.clear()
    paths = ["0.9", str(divided), "0.1", str(tmp_path / "side")]
    assert len(role_paths(paths, "policy", "train")) == 4
    assert role_paths(paths, "policy", "test") == role_paths(paths[:2], "policy", "test")
    assert caplog.messages == [
        f"--data-path {tmp_path / 'side'}: no document for policy/test; it has policy/train 2: left out there"
    ]
    with pytest.raises(DataError, match="no document for judge/train"):
        role_paths(paths, "judge", "train")


def test_roles_of_a_corpus_with_repetitions_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = write_corpus(tmp_path / "plain", {"a": ["x", "y"]})
    run("dedup", "--data-path", plain, "--out", tmp_path / "unique")
    run("roles", "--data-path", tmp_path / "unique", "--out", tmp_path / "one")
    assert not caplog.messages
    run("roles", "--data-path", plain, "--out", tmp_path / "two")
    assert "text made it, not dedup: nearly the same text may be in several roles" in caplog.text


def test_what_is_no_corpus_with_roles_is_named(divided: Path, tmp_path: Path) -> None:
    plain = divided.parent / "corpus"
    (plain / "manifest.json").write_text(json.dumps({"command": "dedup"}))
    for folder, says in (
        (tmp_path, r"no manifest\.json there: with --subset name folders that megatron-sip-prepare roles finished"),
        (tmp_path / "none", "no such folder"),
        (plain, "its documents have no roles yet"),
    ):
        with pytest.raises(DataError, match=says):
            role_paths([str(folder)], "policy", "train")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="a corpus with roles"):
        role_paths([str(tmp_path)], "policy", "train")
    run("roles", "--data-path", write_corpus(tmp_path / "c", {"a": ["x", "y"]}), "--role-shares", "1", "--split", "1,0,0",
        "--out", tmp_path / "out")  # fmt: skip
    with pytest.raises(DataError, match="no document for policy/valid; it has policy/train 2"):
        role_paths([str(tmp_path / "out")], "policy", "valid")
    with pytest.raises(DataError, match="no document for judge; it has policy/train"):
        run("judgements", "--task", "quality", "--data-path", tmp_path / "out", "--no-cut", "--out", tmp_path / "j")
