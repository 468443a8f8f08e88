"""The files that metrics are written to survive kills and resumes; the line on the screen says what matters."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.errors import DataError
from megatron_sip.training.metrics_writer import (
    MetricsWriter,
    drop_steps_after,
    progress_line,
    read_metrics,
    trained_steps,
)


def test_resume_keeps_each_step_once_and_drops_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo'
    )
    writer = MetricsWriter(tmp_path, resume_step=3, total_steps=9)
    writer.write(4, {"loss": 7.0})
    writer.close()
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 7.0),
    ]


def test_a_broken_line_costs_no_later_step_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(1, 7)]
    broken = ['{"step": 2, "lo\x00\x00\n', "\n", "17\n", '{"loss": 1}\n']
    path.write_text("".join([*good[:1], *broken, *good[2:], '{"step": 7, "lo']))
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 4, 5, 6]
    for _ in range(2):
        MetricsWriter(tmp_path, resume_step=5, total_steps=9).close()
        assert path.read_text() == good[0] + "".join(good[2:5])
        assert (tmp_path / "metrics.jsonl.unreadable").read_text() == broken[0] + broken[2] + broken[3]
    assert capsys.readouterr().out.count("3 lines cannot be read; they are now in metrics.jsonl.unreadable") == 1


@given(
    st.lists(st.tuples(st.integers(1, 20), st.binary(max_size=8)), max_size=10), st.integers(0, 20), st.integers(0, 9)
)
def test_whatever_stands_between_the_steps_of_a_file_resume_keeps_them(
    lines: list[tuple[int, bytes]], resumed: int, cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        noise = [between.replace(b"\n", b"") for _, between in lines]
        written = b"".join(b'{"step": %d}\n' % step + n + b"\n" for (step, _), n in zip(lines, noise, strict=True))
        path.write_bytes(written + b'{"step": 99}'[:cut])
        drop_steps_after(path, resumed)
        kept = [step for step, _ in lines if step <= resumed]
        assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == kept


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"[1]\n[2]\n", b'{"prefix": "x"}\n', b"\xff\xfe\n"])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl: no line is a step"):
        read_metrics(path)


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    drop_steps_after(path, 0)
    assert path.read_text() == ""


def test_the_time_left_is_told_from_the_second_step_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0, total_steps=5)
    for step, seconds in enumerate((100.0, 10.0, 20.0, 30.0, 10.0), start=1):
        writer.write(step, {"seconds/total": seconds})
    writer.close()
    shown = [line.rpartition(" | ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["100.0 s", "30 s left", "30 s left", "20 s left", "10.0 s"]


def test_the_progress_line_shows_what_a_step_is_judged_by() -> None:
    numbers = {
        "loss": 0.6931,
        "score/suffix": -3.2,
        "score/rollout": -2.5,
        "chosen_rate/rollout": 0.75,
        "length/rollout": 32.0,
        "dropped/tied": 2.0,
        "dropped/judge-quality-rate-limited": 1.0,
        "judge/verdicts/quality": 37.0,
        "judge/verdicts-missing/quality": 3.0,
        "seconds/rollout": 6.1,
        "seconds/train": 2.0,
        "seconds/total": 9.0,
    }
    line = progress_line(7, 40, numbers, 300.0)
    for part in (
        *("step  7/40", "loss 0.6931", "rollout -2.500 suffix -3.200", "chosen 0.75"),
        *("dropped 3 (tied 2, judge-quality-rate-limited 1)", "verdicts missing 3 of 40"),
        *("| 5 min left", "9.0 s (rollout 6.1, train 2.0)"),
    ):
        assert part in line


def test_a_validation_stands_beside_its_step_and_one_made_again_replaces_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(resume_step: int, *validations: tuple[int, float]) -> list[dict[str, float]]:
        writer = MetricsWriter(tmp_path, resume_step, total_steps=9)
        for step, accuracy in validations:
            if step:
                writer.write(step, {"loss": step / 10})
            writer.write_validation(
                step, {"validation/accuracy/quality": accuracy, "validation/accuracy-in/quality/a": 1.0}
            )
        writer.close()
        return read_metrics(tmp_path / "metrics.jsonl")

    first = write(0, (0, 0.5), (1, 0.625), (2, 0.75))
    assert [(record["step"], record.get("loss"), record["validation/accuracy/quality"]) for record in first] == [
        (0, None, 0.5),
        (1, 0.1, 0.625),
        (2, 0.2, 0.75),
    ]
    assert trained_steps(first) == 2
    assert "validation at step 2: accuracy quality 0.750\n" in capsys.readouterr().out
    resumed = write(1)  # whose validation is then due again
    assert [record["step"] for record in resumed] == [0, 1]
    writer = MetricsWriter(tmp_path, resume_step=1, total_steps=9)
    writer.write_validation(1, {"validation/accuracy/quality": 0.875})
    writer.close()
    [_, again] = read_metrics(tmp_path / "metrics.jsonl")
    assert (again["loss"], again["validation/accuracy/quality"]) == (0.1, 0.875)
