"""Killed at any moment (SIGKILL, by itself, at chosen places), the same command ends with the same bytes."""

from __future__ import annotations

import os
import signal
import tracemalloc
from pathlib import Path

import pytest
from forks import forks
from prepare_cases import files_below, run, write_documents, write_records

from megatron_sip.prepare import journal, output, pipeline
from megatron_sip.prepare.settings import PrepareError


def command(folder: Path, out: str) -> tuple[str | Path, ...]:
    data = ("--data-path", folder / "a.jsonl", folder / "b.jsonl", "--no-cut", "--role-shares", "1,3,1")
    rules = ("--corrupt", "shuffle", "numbers", "--format", "sip", "verl", "nemo-gym")
    return ("judgements", "--task", "quality", *data, *rules, "--out", folder / out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_documents(folder / "a.jsonl", 23)
    write_documents(folder / "b.jsonl", 40)
    return folder


def run_until_killed(words: tuple[str | Path, ...], number: int, function: str, after: bool) -> None:
    """Run a command in this process, which kills itself before or after the `number`-th call of a function (0: never)."""
    pipeline.UNIT = 5
    calls = 0
    place = journal if hasattr(journal, function) else output
    original = getattr(place, function)

    def counting(*values: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*values, **named)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, function, counting)
    run(*words)


def exit_code(words: tuple[str | Path, ...], number: int, function: str, after: bool) -> int | None:
    """Of a process of its own; minus the signal that ended it."""
    process = forks().Process(target=run_until_killed, args=(words, number, function, after))
    process.start()
    process.join(300)
    process.kill()  # one that hangs, whose exit code is none
    return process.exitcode


KILLS = [
    (1, "write_atomically", False),  # records are there, the progress is not
    (2, "write_atomically", False),
    (1, "write_atomically", True),
    (3, "write_atomically", False),
    (1, "verl_row", False),  # files are being written
    (30, "nemo_gym_line", True),
    (2, "write_atomically", False),  # all but the manifest is there
]


def test_every_kill_is_survived(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "UNIT", 5)
    run(*command(folder, "whole"))
    expected = files_below(folder / "whole")
    assert len(expected) == 8
    words = command(folder, "killed")
    for kill in KILLS:
        assert exit_code(words, *kill) == -signal.SIGKILL, kill
    assert exit_code(words, 0, "write_atomically", False) == 0
    assert files_below(folder / "killed") == expected


def test_two_processes_do_not_work_in_one_folder(folder: Path) -> None:
    with (
        journal.Journal.open(folder / "held", {}),
        pytest.raises(journal.PrepareError, match="another process"),
        journal.Journal.open(folder / "held", {}),
    ):
        pass


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "UNIT", 16)
    peaks = []
    for count in (200, 1200):
        data = write_records(
            tmp_path / f"{count}.jsonl", [{"text": f"{i:04} " * 4_000, "ok": True} for i in range(count)]
        )
        words = ("rewrites", "--data-path", data, "--no-cut", "--label-field", "ok", "--role-shares", "0,0,1")
        tracemalloc.start()
        run(*words, "--out", tmp_path / f"out-{count}")  # other formats remember 4,096 texts in their marks
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    assert peaks[1] < (tmp_path / "1200.jsonl").stat().st_size


def test_exports_of_two_runs_are_two_teachers(tmp_path: Path) -> None:
    with journal.Journal.open(tmp_path, {"task": "x"}) as first:
        first.made_by("runs/cycle/judge/hf")
        first.made_by("/elsewhere/cycle/judge/hf")
        for other in ("runs/cycle2/judge/hf", "runs/cycle/policy/hf"):
            with pytest.raises(PrepareError, match=f"and {other} would go on"):
                first.made_by(other)


def test_records_are_one_teacher_s(tmp_path: Path) -> None:
    with journal.Journal.open(tmp_path, {"task": "x"}) as first:
        first.made_by("/models/judge-8b")
        first.commit([{"a": 1}], (0, 5), {})
    with journal.Journal.open(tmp_path, {"task": "x"}) as other:
        with pytest.raises(PrepareError, match="were made by /models/judge-8b, and /models/judge-70b would go on"):
            other.made_by("/models/judge-70b")
        other.made_by("/scratch/job2/judge-8b")  # a copy of it
        other.finish({"records": {}})
    with journal.Journal.open(tmp_path, {"task": "x"}) as done:
        assert done.manifest()["teacher"] == "/scratch/job2/judge-8b"
