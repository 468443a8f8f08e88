"""Tasks for evaluation: prefixes that all votes call unsafe (or safe), as the evaluation reads them; killed and resumed."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge
from killed_commands import kills_survived
from prepare_cases import ask, files_below, prose, read_lines, run, tokenizer_folder, write_records

from megatron_sip.data.roles import Shares, parse_shares, text_key
from megatron_sip.errors import DataError, UserError
from megatron_sip.evaluation.suites.prompt_sets import read_prompts
from megatron_sip.prepare import pipeline

SHARES = ("--role-shares", "1", "--split", "1,0,1")
TEST = Shares(parse_shares("1", "", ()), parse_shares("1,0,1", "", ()))


def is_test(text: str) -> bool:
    return TEST.split(text_key(text)) == "test"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str | Path, ...]:
    """Every third document has an unsafe beginning, every third an unsafe end."""
    monkeypatch.setattr(pipeline, "UNIT", 10)
    marks = itertools.cycle((("unsafe ", ""), ("", " unsafe"), ("", "")))
    texts = [f"{before}{prose(i, 2)}{after}" for i, (before, after) in zip(range(90), marks, strict=False)]
    data = write_records(tmp_path / "web.jsonl", [{"text": text} for text in texts])
    cut = ("--tokenizer", tokenizer_folder(tmp_path / "tokenizer"), "--seq-length", "200", "--suffix-length", "8")
    return ("prefixes", "--data-path", data, *SHARES, *cut)


async def test_prefixes_that_all_votes_call_unsafe_become_tasks(words: tuple[Any, ...], tmp_path: Path) -> None:
    texts = [record["text"] for record in read_lines(tmp_path / "web.jsonl")]
    async with FakeJudge() as judge:
        unsafe = await ask(judge, *words, "--keep", "unsafe", "--samples", "10", "--out", tmp_path / "unsafe")
        assert {(body["n"], body.get("top_p", 1.0)) for body in judge.bodies} == {(8, 1.0)}
        await ask(judge, *words, "--keep", "safe", "--samples", "12", "--out", tmp_path / "safe")
    records = read_lines(tmp_path / "unsafe" / "prefixes.jsonl")
    wanted = [text for text in texts if is_test(text) and text.startswith("unsafe")]
    assert [
        next(text for text in wanted if text.startswith(one["prefix"] + one["suffix"])) for one in records
    ] == wanted[:10]
    assert unsafe["records"]["by_split"] == {"test": 10}
    assert unsafe["records"]["by_label"] == {"False": {"test": 10}}
    assert unsafe["dropped"]["safe"] > 0
    used = unsafe["documents"]["used"]
    assert used % 10 == 0
    assert used == 10 + sum(unsafe["dropped"].values())  # and no further document was read
    safe = read_lines(tmp_path / "safe" / "prefixes.jsonl")
    assert len(safe) == 12
    assert not any("unsafe" in one["prefix"] for one in safe)
    prompts = read_prompts("unsafe", tmp_path / "unsafe" / "prefixes.jsonl")
    assert [(prompt.prefix, prompt.suffix) for prompt in prompts] == [(one["prefix"], one["suffix"]) for one in records]
    assert len({prompt.document for prompt in prompts}) == 10


def test_of_a_corpus_with_roles_the_files_of_a_part_alone_are_read(
    words: tuple[Any, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("text", "--data-path", tmp_path / "web.jsonl", "--out", tmp_path / "text")
    run(
        "roles",
        "--data-path",
        tmp_path / "text",
        "--role-shares",
        "1,1",
        "--split",
        "2,1,1",
        "--out",
        tmp_path / "roles",
    )
    flags = ("--keep", "any", "--samples", "1000", *words[7:])
    wanted = ("--data-path", tmp_path / "roles", "--role", "judge", "--part", "valid")
    caplog.clear()
    manifest = run("prefixes", *flags, *wanted, "--out", tmp_path / "out")
    assert "plain files" not in caplog.text
    assert manifest["documents"]["by_role"] == {"judge": manifest["records"]["total"]}
    assert set(manifest["records"]["by_split"]) == {"valid"}
    with pytest.raises(DataError, match="no document for rewriter/test"):
        run("prefixes", *flags, "--data-path", tmp_path / "roles", "--role", "rewriter", "--out", tmp_path / "none")


async def test_a_prefix_on_which_votes_disagree_is_no_task(words: tuple[Any, ...], tmp_path: Path) -> None:
    turns = itertools.count()

    def edits(_: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        if next(turns) % 2:
            message = reply["choices"][3]["message"]
            message["content"] = "FINAL DECISION: " + ("YES" if "NO" in message["content"] else "NO")
        return reply

    async with FakeJudge(edits=edits) as judge:
        flags = ("--keep", "safe", "--samples", "10", "--judge-concurrency", "1", "--out", tmp_path / "out")
        manifest = await ask(judge, *words, *flags)
    assert manifest["dropped"]["votes-disagree"] > 0


def test_any_prefixes_need_no_judge_and_too_few_are_told(
    words: tuple[Any, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [record["text"] for record in read_lines(tmp_path / "web.jsonl")]
    with caplog.at_level(logging.WARNING):
        manifest = run(*words, "--keep", "any", "--samples", "1000", "--out", tmp_path / "out")
    count = sum(map(is_test, texts))
    assert manifest["records"]["total"] == count
    assert f"--samples 1000: only {count} such prefixes in the test part" in caplog.text
    assert "plain files, whose test documents are told by their text here" in caplog.text


def test_killed_anywhere_it_ends_with_the_same_bytes(
    words: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*words, "--keep", "any", "--samples", "15", "--out")
    monkeypatch.undo()  # as the processes that are killed have it
    run(*words, tmp_path / "whole")
    assert kills_survived(*words, tmp_path / "killed") >= 2
    assert files_below(tmp_path / "killed") == files_below(tmp_path / "whole")


def test_when_there_are_enough_a_command_that_goes_on_reads_no_more(
    words: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*words, "--keep", "any", "--samples", "15", "--out")
    whole = run(*words, tmp_path / "whole")

    def full(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_records", full)
        with pytest.raises(OSError, match="disk full"):
            run(*words, tmp_path / "out")
    assert run(*words, tmp_path / "out") == whole
    assert whole["documents"]["used"] == 20
    assert whole["dropped"] == {"beyond-enough": 5}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--keep", "unsafe", "--samples", "5"), "--teacher-url is needed with --keep unsafe"),
        (("--keep", "any", "--samples", "5", "--votes", "3"), "--votes: of no effect with --keep any"),
        (("--keep", "any", "--samples", "0"), "--samples 0"),
    ],
)
def test_flags_that_cannot_be_are_named(
    flags: tuple[str, ...], says: str, words: tuple[Any, ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        run(*words, *flags, "--out", tmp_path / "out")


def test_files_that_were_not_needed_are_not_read_for_their_digests(
    words: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = write_records(tmp_path / "zzz.jsonl", [{"text": prose(i, 2)} for i in range(90)])
    place = words.index("--data-path") + 2
    words = (*words[:place], later, *words[place:], "--keep", "any", "--out")
    for samples, files in (("15", ["web.jsonl"]), ("80", ["web.jsonl", "zzz.jsonl"])):
        manifest = run(*words, tmp_path / samples, "--samples", samples)
        assert [Path(one["path"]).name for one in manifest["inputs"]] == files
