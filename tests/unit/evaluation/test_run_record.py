"""What a run folder says of how it was started, and the samples of training that it keeps."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as draw
from hypothesis import strategies as st

from megatron_sip.config.early_checks import check_flags
from megatron_sip.evaluation.outcome import outcome_line, write_outcome
from megatron_sip.evaluation.report import BIDI_MARKS, write_report
from megatron_sip.evaluation.run_record import read_run_record, run_record, write_run_record
from megatron_sip.experience.samples import CANDIDATES, RECORDED_STEPS, SampleLog, read_samples
from megatron_sip.records import Branch, Candidate, Example, Group, Task

COMPLETE = [
    *("--hf-config", "my model", "--data-path", "a.jsonl", "b.jsonl", "--save", "run", "--seq-length", "256"),
    *("--train-iters", "3", "--lr", "1e-3", "--lr", "2e-3", "--suffix-length", "128", "--bf16"),
    *("--teacher-url", "https://judge", "--rollout-url", "http://e:1", "--adam-beta2", "0.95"),
]


@pytest.fixture(autouse=True)
def files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What COMPLETE names."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "my model").mkdir()
    for name in ("my model/config.json", "a.jsonl", "b.jsonl"):
        (folder / name).write_text("{}")
    monkeypatch.chdir(folder)


def group(index: int, scores: list[float] | None, text: str = "text") -> Group:
    task = Task(index, [1, 2], [3], "a prefix " * 200, "suffix")
    count = len(scores) if scores else 2
    made = [Candidate("rollout" if i else "suffix", [5, i], f"{text} {i}") for i in range(count)]
    return Group(task, made, scores, dropped=None if scores else "judge-quality-timeout")


def example(index: int, chosen: int, rejected: int) -> Example:
    return Example(
        index, [1, 2], [Branch([5, chosen], "chosen", "rollout"), Branch([5, rejected], "rejected", "rollout")]
    )


def test_the_record_holds_what_differs_from_the_defaults_and_the_command_to_continue(tmp_path: Path) -> None:
    record = run_record(COMPLETE, check_flags(COMPLETE), {})
    assert record.settings["--data-path"] == "a.jsonl b.jsonl"
    assert record.settings["--lr"] == "2e-3"  # the last one counts
    assert record.settings["--adam-beta2"] == "0.95"
    assert record.settings["--bf16"] == ""
    assert "--suffix-length" not in record.settings  # 128 is the default
    assert record.initial_weights == "random"
    assert shlex.split(record.command)[:5] == ["python", "-m", "megatron_sip.train", "--hf-config", "my model"]
    write_run_record(tmp_path, record)
    assert read_run_record(tmp_path) == record


def test_under_torchrun_the_command_starts_with_it() -> None:
    flags = check_flags(COMPLETE)
    environment = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}
    command = run_record(COMPLETE, flags, environment).command
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 8 -m megatron_sip.train --hf-config")
    started = [*COMPLETE, "--started-as", "megatron-sip HF --teacher T"]
    record = run_record(started, check_flags(started), environment)
    assert record.command == "megatron-sip HF --teacher T"
    assert "--started-as" not in record.settings


def test_random_weights_stand_in_summary_and_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    write_run_record(tmp_path, run_record(COMPLETE, check_flags(COMPLETE), {}))
    summary = write_outcome(tmp_path, None)
    assert summary["initial_weights"] == "random"
    assert str(tmp_path / "report.html") in outcome_line(tmp_path, summary)
    page = (tmp_path / "report.html").read_text()
    assert "random: --hf-config gave only the architecture" in page
    assert '<pre dir="auto">python -m megatron_sip.train --hf-config &#x27;my model&#x27;' in page
    assert "--adam-beta2" in page


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@draw(st.integers(1, 5000))
def test_a_run_of_any_length_keeps_few_samples(steps: int) -> None:
    log = SampleLog.of(Path("run"), steps)
    due = [step for step in range(steps) if step % log.interval == 0]
    assert due[0] == 0
    assert min(steps, RECORDED_STEPS) <= len(due) <= 2 * RECORDED_STEPS


def test_a_sample_shows_what_was_trained_on_and_the_best_others(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "samples.jsonl", 2)
    groups = [group(0, None), group(1, [0.1 * i for i in range(17)])]
    for step in range(3):
        log.record(step, groups, [example(1, 16, 0)])
    log.record(2, [group(5, None)], [])  # again, after a restart
    first, last = read_samples(tmp_path)
    assert (first["step"], last["step"]) == (1, 3)
    assert [made["role"] for made in first["candidates"]] == ["chosen", "rejected", None, None, None, None]
    assert [round(made["score"], 1) for made in first["candidates"]] == [1.6, 0.0, 1.5, 1.4, 1.3, 1.2]
    assert len(first["candidates"]) == CANDIDATES
    assert len(first["prefix"]) == 701
    assert last["dropped"] == "judge-quality-timeout"
    assert {made["score"] for made in last["candidates"]} == {None}


def test_a_sample_of_a_group_that_is_all_trained_on_shows_its_best_and_worst(tmp_path: Path) -> None:
    judged = group(1, [0.1 * i for i in range(17)])
    branches = [Branch(made.ids, "sampled", "rollout", advantage=0.0) for made in judged.candidates[:12]]
    SampleLog(tmp_path / "samples.jsonl", 1).record(0, [judged], [Example(1, [1], branches)])
    [sample] = read_samples(tmp_path)
    assert [round(made["score"], 1) for made in sample["candidates"]] == [1.1, 1.0, 0.9, 0.2, 0.1, 0.0]
    assert {made["role"] for made in sample["candidates"]} == {"sampled"}


def test_a_full_disk_or_a_half_written_line_costs_samples_only(tmp_path: Path) -> None:
    SampleLog(tmp_path / "file" / "samples.jsonl", 1).record(0, [group(0, [0.0, 1.0])], [])
    (tmp_path / "file" / "samples.jsonl").open("a").write('{"step": 8}\n[1]\nnull\n{"step": 7, "pre')
    assert [sample["step"] for sample in read_samples(tmp_path / "file")] == [1]
    (tmp_path / "plain").write_text("no folder")
    SampleLog(tmp_path / "plain" / "samples.jsonl", 1).record(0, [group(0, [0.0, 1.0])], [])


@pytest.mark.parametrize(
    "content", ["", "[]", '{"command": "x"}', '{"command": 1, "settings": 2, "initial_weights": 3}']
)
def test_a_foreign_record_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    assert read_run_record(tmp_path) is None


def test_texts_with_bidi_marks_turn_nothing_round(tmp_path: Path) -> None:
    marks = "\u202e\u2066\u200f\u2069\u202a"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, f"dropped/{marks}x": 1.0, "groups": 1.0}) + "\n")
    SampleLog(tmp_path / "samples.jsonl", 1).record(0, [group(1, [0.0, 1.0], f"שלום {marks}")], [example(1, 1, 0)])
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert BIDI_MARKS.search(page) is None
    assert "⟨U+202E⟩" in page
    assert "שלום" in page
    assert page.count("<pre") == page.count('<pre dir="auto"') > 2
