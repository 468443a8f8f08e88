"""Recorded groups come back equal, whatever the number of replicas, and never for other tasks."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.errors import DataError
from megatron_sip.experience.recording import read_groups, write_groups
from megatron_sip.records import Candidate, Group, Task

TASKS = [Task(index, [1, 2 + index], [3, 4], "prefix é", " suffix") for index in range(8, 12)]


def group(task: Task) -> Group:
    rollout = Candidate("rollout", [5, 6], " other\u2028line", [-0.5, -1.25], "3")
    return Group(
        task, [Candidate("suffix", task.suffix_ids, task.suffix_text), rollout], [0.5, -1e-9], {"quality": [1, 0]}
    )


def test_groups_of_two_replicas_are_read_by_one(tmp_path: Path) -> None:
    write_groups(tmp_path, 2, 0, [group(task) for task in TASKS[:2]])
    write_groups(tmp_path, 2, 1, [group(task) for task in TASKS[2:]])
    assert read_groups(tmp_path, 2, TASKS) == [group(task) for task in TASKS]
    assert read_groups(tmp_path, 2, TASKS[3:]) == [group(TASKS[3])]


def test_rounds_of_a_step_have_files_of_their_own(tmp_path: Path) -> None:
    paths = [write_groups(tmp_path, 2, 0, [group(task)], number) for number, task in enumerate(TASKS[:3])]
    assert paths[0].name == "step_0000002.replica_0.jsonl.zst"
    assert paths[2].name == "step_0000002.round_2.replica_0.jsonl.zst"
    assert [read_groups(tmp_path, 2, [task]) for task in TASKS[:3]] == [[group(task)] for task in TASKS[:3]]
    with pytest.raises(DataError, match=r"task 11 is not among the 3 of step 2: .*another --.* or --grpo-oversample"):
        read_groups(tmp_path, 2, TASKS[3:])


def test_a_dropped_group_stays_dropped(tmp_path: Path) -> None:
    dropped = replace(group(TASKS[0]), scores=None, dropped="rollout timeout")
    write_groups(tmp_path, 0, 0, [dropped])
    assert read_groups(tmp_path, 0, TASKS[:1]) == [dropped]


def test_other_tasks_and_missing_steps_are_refused(tmp_path: Path) -> None:
    write_groups(tmp_path, 0, 0, [group(TASKS[0])])
    with pytest.raises(DataError, match="other tasks"):
        read_groups(tmp_path, 0, [replace(TASKS[0], suffix_ids=[9])])
    with pytest.raises(DataError, match="no groups of step 1"):
        read_groups(tmp_path, 1, TASKS[:1])


@settings(max_examples=12, deadline=None)  # every file is brought to the disk
@given(st.integers(1, 4), st.integers(1, 4))
def test_a_step_that_is_recorded_again_by_another_number_of_replicas_is_read_from_the_newest(
    before: int, after: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for time, (replicas, version) in enumerate(((before, "1"), (after, "2")), start=1):
            for replica in range(replicas):
                share = [group(task) for task in TASKS[replica::replicas]]
                rollouts = [replace(g.candidates[1], weight_version=version) for g in share]
                share = [
                    replace(g, candidates=[g.candidates[0], rollout])
                    for g, rollout in zip(share, rollouts, strict=True)
                ]
                os.utime(write_groups(folder, 5, replica, share), (time, time))
        found = read_groups(folder, 5, TASKS)
        assert [g.task for g in found] == TASKS
        assert {g.candidates[1].weight_version for g in found} == {"2"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 400), st.booleans())
def test_a_file_that_is_cut_short_or_foreign_is_named(length: int, compressed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = write_groups(Path(name), 0, 0, [group(task) for task in TASKS])
        content = path.read_bytes()
        if compressed:
            path.write_bytes(content[: min(length, len(content) - 1)])
        else:
            text = zstandard.decompress(content)
            path.write_bytes(zstandard.compress(text[: max(1, min(length, len(text) - 2))]))
        with pytest.raises(DataError, match=rf"{path.name} is not a file of judged groups, or only a part"):
            read_groups(Path(name), 0, TASKS)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"1", b'{"task": {"index": 1}, "candidates": 5}', b"\xff"])
def test_records_of_something_else_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "step_0000000.replica_0.jsonl.zst").write_bytes(zstandard.compress(content))
    with pytest.raises(DataError, match=r"step_0000000\.replica_0\.jsonl\.zst is not a file of judged groups"):
        read_groups(tmp_path, 0, TASKS)


def test_a_missing_share_of_a_step_is_told_apart_from_other_tasks(tmp_path: Path) -> None:
    write_groups(tmp_path, 0, 0, [group(task) for task in TASKS[:2]])
    with pytest.raises(DataError, match="task 10 is not among the 2 of step 0: a file of that step is missing"):
        read_groups(tmp_path, 0, TASKS)
