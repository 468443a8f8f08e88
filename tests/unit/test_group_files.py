"""Recorded groups come back equal, whatever the number of replicas, and never for other tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sip.data.errors import DataError
from megatron_sip.group_files import read_groups, write_groups
from megatron_sip.samples import Candidate, Group, Task

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
