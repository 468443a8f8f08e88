"""Judged groups on disk, so that a step can be trained again without engines or teacher: debugging, ablations, exact tests.

`--save-groups DIR` writes one file a step and replica, `DIR/step_0000012.replica_0.jsonl.zst`; `--replay-groups DIR` trains
from them, with any number of replicas. Selection runs again, so the objective may differ from that of the recording run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import zstandard

from megatron_sip.data.errors import DataError
from megatron_sip.files import write_atomically
from megatron_sip.samples import Group, Task, group_from_json


def write_groups(folder: Path, step: int, replica: int, groups: Sequence[Group]) -> Path:
    """Write the groups of one replica's share of `step`; the file appears only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:07d}.replica_{replica}.jsonl.zst"
    text = "".join(json.dumps(group.to_json(), ensure_ascii=False) + "\n" for group in groups)
    write_atomically(path, zstandard.compress(text.encode()))
    return path


def read_groups(folder: Path, step: int, tasks: Sequence[Task]) -> list[Group]:
    """The recorded group of each of `tasks`, in order, whichever replica recorded it.

    Raises:
        DataError: the step was not recorded, or not for these tasks.
    """
    paths = sorted(folder.glob(f"step_{step:07d}.replica_*.jsonl.zst"))
    if not paths:
        raise DataError(f"--replay-groups {folder}: no groups of step {step}; it was recorded with fewer steps")
    recorded: dict[int, Group] = {}
    for path in paths:
        # Split as bytes: str.splitlines would also split at the line separators that text may contain.
        for line in zstandard.decompress(path.read_bytes()).splitlines():
            group = group_from_json(json.loads(line))
            if group.task.index in recorded:
                raise DataError(
                    f"--replay-groups {folder}: task {group.task.index} was recorded twice; use a fresh folder"
                )
            recorded[group.task.index] = group
    groups = []
    for task in tasks:
        if task.index not in recorded or recorded[task.index].task != task:
            raise DataError(
                f"--replay-groups {folder}: step {step} was recorded for other tasks than task {task.index} of this run: use "
                "the same --data-path, --split, --seq-length, --suffix-length, --task-mode, --seed and --global-batch-size"
            )
        groups.append(recorded[task.index])
    return groups
