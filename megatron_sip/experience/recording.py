"""Judged groups on disk, so that a step can be trained again without engines or teacher: debugging, ablations, exact tests.

`--save-groups DIR` writes one file per step and replica, `DIR/step_0000012.replica_0.jsonl.zst`, and one for each further
round of tasks that the step asked for, `DIR/step_0000012.round_1.replica_0.jsonl.zst`; `--replay-groups DIR` trains from
them, with any number of replicas. Selection runs again, so the objective may differ from that of the recording run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import zstandard

from megatron_sip.errors import DataError
from megatron_sip.files import described, write_atomically
from megatron_sip.records import Group, Task, group_from_json


def write_groups(folder: Path, step: int, replica: int, groups: Sequence[Group], round_index: int = 0) -> Path:
    """Write the groups of one replica's share of a round of `step`; the file appears only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    which = f"step_{step:07d}" + (f".round_{round_index}" if round_index else "")
    path = folder / f"{which}.replica_{replica}.jsonl.zst"
    text = "".join(json.dumps(group.to_json(), ensure_ascii=False) + "\n" for group in groups)
    write_atomically(path, zstandard.compress(text.encode()))
    return path


def read_groups(folder: Path, step: int, tasks: Sequence[Task]) -> list[Group]:
    """The recorded group of each of `tasks`, in order, whichever replica recorded it and in whichever round of the step.

    Of a task that was recorded twice, as after a resume with fewer replicas, which leaves files of the others behind, the
    group of the newest file is taken.

    Raises:
        DataError: the step was not recorded, or not for these tasks; a file is cut short or holds something else.
    """
    paths = sorted(folder.glob(f"step_{step:07d}.*.jsonl.zst"), key=age)
    if not paths:
        raise DataError(f"--replay-groups {folder}: no groups of step {step}; it was recorded with fewer steps")
    recorded: dict[int, Group] = {}
    for path in paths:
        recorded |= {group.task.index: group for group in groups_in(path)}
    groups = []
    for task in tasks:
        if task.index not in recorded:
            raise DataError(
                f"--replay-groups {folder}: task {task.index} is not among the {len(recorded)} of step {step}: a file of that "
                "step is missing, or the run was recorded with another --global-batch-size or --grpo-oversample"
            )
        if recorded[task.index].task != task:
            raise DataError(
                f"--replay-groups {folder}: step {step} was recorded for other tasks than task {task.index} of this run: use "
                "the same --data-path, --split, --seq-length, --suffix-length, --min-prefix-length, --task-mode, "
                "--prepend-bos, --seed and --global-batch-size"
            )
        groups.append(recorded[task.index])
    return groups


def age(path: Path) -> tuple[int, str]:
    """Sorts files from the oldest to the newest one."""
    return path.stat().st_mtime_ns, path.name


def step_name(path: Path) -> str:
    """Equal for the files of one step."""
    return path.name.partition(".")[0]


def group_files(folder: Path) -> list[Path]:
    """The files of every step and replica in order. Raises DataError where there are none."""
    paths = sorted(folder.glob("step_*.jsonl.zst"))
    if not paths:
        raise DataError(f"{folder}: no recorded groups (step_*.jsonl.zst): a run writes them there with --save-groups")
    return paths


def groups_in(path: Path) -> list[Group]:
    """The groups of one file. Raises DataError for a file cut short, or of something else."""
    groups = []
    with described(path, "a file of judged groups"):
        try:
            content = zstandard.decompress(path.read_bytes())
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        # Split as bytes: str.splitlines would also split at the line separators that text may contain.
        for line in content.split(b"\n"):
            if line:
                groups.append(group_from_json(json.loads(line)))
    return groups
