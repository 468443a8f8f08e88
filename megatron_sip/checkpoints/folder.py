"""The folder of Megatron's checkpoints, kept readable after a kill at any moment.

Megatron commits a checkpoint by writing its tracker file last. A run killed while saving leaves a folder that no tracker
names, or an empty tracker; both are mended at the next start, before anything is loaded. Whoever writes an earlier step
into the tracker goes back to it: complete checkpoints after it are moved aside, not removed.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.files import write_atomically

TRACKER = "latest_checkpointed_iteration.txt"
REFERENCE_FOLDER = "reference"
RUN_ID = "run_id"
"""Below the checkpoint folder; has a folder for each moment at which the DPO reference changed."""


def mend_checkpoint_folder(save: Path, *, last_whole: bool = False) -> list[str]:
    """Remove what a killed run left half-written below `save`, move complete checkpoints after the tracked one aside, and
    repair the tracker; returns what was done.

    Only one rank may call this, before any rank loads. With `last_whole` a tracked step without a complete checkpoint is
    moved aside too, and the newest complete one before it takes its place.

    Raises:
        DataError: the tracker names a step of which there is no complete checkpoint, while there are others.
    """
    done: list[str] = []
    if not save.is_dir():
        return done
    tracker = save / TRACKER
    if tracker.exists() and tracker.read_bytes().strip() == b"release":
        return done  # a converted model, not a run
    committed = _tracked_iteration(tracker)
    complete = complete_checkpoints(save)
    if committed is None and complete:
        committed = max(complete)
        write_tracker(tracker, committed)
        done.append(f"{tracker} was missing or unreadable: set to {committed}, the newest complete checkpoint")
    elif committed is None and tracker.exists():
        tracker.unlink()
        done.append(f"{tracker} was unreadable and there is no complete checkpoint: removed")
    elif complete and committed is not None and committed not in complete:
        if not last_whole or min(complete) > committed:
            raise DataError(
                f"{tracker} names step {committed}, of which there is no complete checkpoint: write one of "
                f"{', '.join(map(str, sorted(complete)))} into it, or continue before it with --load-last-whole"
            )
        done += go_back(save, committed)
        committed = _tracked_iteration(tracker)
    for iteration, path in iteration_folders(save).items():
        if iteration not in complete and (committed is None or iteration > committed):
            shutil.rmtree(path)
            done.append(f"{path} was not committed: removed")
    for staged in (save / REFERENCE_FOLDER).glob("staged_*"):
        shutil.rmtree(staged)
        done.append(f"{staged} is half of a reference: removed")
    newer = [iteration for iteration in sorted(complete) if committed is not None and iteration > committed]
    return [*done, *_set_aside(save, committed or 0, newer)]


def complete_checkpoints(save: Path) -> dict[int, Path]:
    """The committed checkpoints below `save`, by iteration."""
    return {iteration: path for iteration, path in iteration_folders(save).items() if is_complete(path)}


def is_complete(folder: Path) -> bool:
    """Whether Megatron finished writing the checkpoint: its metadata, which come last, are there and say something."""
    try:
        metadata = json.loads((folder / "metadata.json").read_bytes())
        index = folder / ".metadata"
        return isinstance(metadata, dict) and bool(metadata) and (not index.exists() or index.stat().st_size > 0)
    except (OSError, ValueError):
        return False


def go_back(save: Path, damaged: int) -> list[str]:
    """Make the newest complete checkpoint before step `damaged` the tracked one, and move that step aside.

    Raises:
        DataError: there is none before it.
    """
    earlier = max((iteration for iteration in complete_checkpoints(save) if iteration < damaged), default=None)
    if earlier is None:
        raise DataError(f"{save}: there is no complete checkpoint before the damaged one of step {damaged}")
    write_tracker(save / TRACKER, earlier)
    present = [iteration for iteration in sorted(iteration_folders(save)) if earlier < iteration <= damaged]
    return [f"{save / TRACKER} set to {earlier}: step {damaged} is damaged", *_set_aside(save, earlier, present)]


def reference_folder(save: Path, iteration: int) -> Path | None:
    """Where the DPO reference is that the checkpoint of `iteration` goes with: the newest not after it."""
    found = iteration_folders(save / REFERENCE_FOLDER)
    newest = max((saved for saved in found if saved <= iteration), default=None)
    return None if newest is None else found[newest]


def _set_aside(save: Path, committed: int, iterations: Sequence[int]) -> list[str]:
    """Move these checkpoints, and the references that changed after `committed` and go with them, where nobody looks."""
    if not iterations:
        return []
    aside, number = save / f"set_aside_after_{committed:07d}", 1
    while aside.exists():
        number += 1
        aside = save / f"set_aside_after_{committed:07d}_{number}"
    references = iteration_folders(save / REFERENCE_FOLDER)
    # References first: after a kill in between, the checkpoints still say what is to be done.
    moved = [(path, aside / REFERENCE_FOLDER) for i, path in references.items() if committed < i <= max(iterations)]
    moved += [(iteration_folders(save)[iteration], aside) for iteration in iterations]
    done = []
    for path, target in moved:
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / path.name)
        done.append(f"{path} is after {committed}, which {TRACKER} names: moved to {target / path.name}")
    return done


def write_tracker(tracker: Path, iteration: int) -> None:
    """Name `iteration` as the latest checkpoint, in one move."""
    write_atomically(tracker, str(iteration))


def tracked_iteration(save: Path) -> int | None:
    """The step that the tracker of `save` names; None without one, or when it names a converted model."""
    return _tracked_iteration(save / TRACKER)


def weights_folder(folder: Path) -> Path:
    """Where the checkpoint's files are that the tracker of `folder` names."""
    step = tracked_iteration(folder)
    return folder / "release" if step is None else folder / f"iter_{step:07d}"


def require_checkpoint(folder: Path) -> None:
    """Raise DataError unless `folder`, which --pretrained-checkpoint names, holds a checkpoint."""
    if not (folder / TRACKER).is_file():
        raise DataError(
            f"--pretrained-checkpoint {folder} holds no checkpoint: it has no {TRACKER}; give the folder that the converter "
            "or a run has written, or a Hugging Face folder"
        )


def _tracked_iteration(tracker: Path) -> int | None:
    if not tracker.exists():
        return None
    text = tracker.read_bytes().strip()  # whatever a power cut left there
    return int(text) if text.isdigit() else None


def needed_references(references: Collection[int], checkpoints: Collection[int]) -> set[int]:
    """Which reference weights (by iteration) a resume can still ask for: each checkpoint's own, and all newer ones.

    A checkpoint goes with the newest reference not after it; one whose reference was saved first may have no folder yet.
    """
    newest = max(checkpoints, default=-1)
    needed = {iteration for iteration in references if iteration > newest}
    for checkpoint in checkpoints:
        earlier = [iteration for iteration in references if iteration <= checkpoint]
        needed.update(earlier and [max(earlier)])
    return needed


def iteration_folders(save: Path) -> dict[int, Path]:
    """The folders `iter_NNNNNNN` below `save`, by iteration."""
    folders = [path for path in save.glob("iter_*") if path.is_dir()]
    return {int(m.group(1)): path for path in folders if (m := re.fullmatch(r"iter_(\d+)", path.name))}


def run_id(folder: Path) -> str:
    """The name of the run in `folder`, which no other has and all its starts share; made by the first."""
    path = folder / RUN_ID
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
