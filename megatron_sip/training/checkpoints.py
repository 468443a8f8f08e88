"""A run's checkpoints and the disk: only whole ones are loaded, and one that could not be saved is explained."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch.distributed.checkpoint import CheckpointException

from megatron_sip.checkpoints.checksums import damages
from megatron_sip.checkpoints.folder import (
    complete_checkpoints,
    go_back,
    reference_folder,
    tracked_iteration,
    weights_folder,
)
from megatron_sip.console import say
from megatron_sip.errors import DataError
from megatron_sip.files import DiskError

FULL = (errno.ENOSPC, errno.EDQUOT)
SHOWN = 3
"""Damaged files that a message names."""


class Ranks(Protocol):
    """What is needed of `LeaderExchange`."""

    def all_gather_from_leaders(self, mine: Any) -> list[Any]: ...

    def all_gather(self, mine: Any) -> list[Any]: ...


def require_whole_checkpoint(save: Path, ranks: Ranks, rank: int, *, last_whole: bool) -> None:
    """Read the files of the checkpoint that is to be loaded, and of its reference, divided among all ranks.

    With `last_whole` damaged checkpoints are moved aside until one is whole. Collective.

    Raises:
        DataError: on all ranks, when a file is missing, cut short or changed; it names the file and the way out.
    """
    while (step := ranks.all_gather_from_leaders(tracked_iteration(save))[0]) is not None:
        complete, reference = complete_checkpoints(save), reference_folder(save, step)
        found = _damages(complete.get(step), ranks, rank)
        of_reference = _damages(reference, ranks, rank)
        if step not in complete:
            found.append(f"{weights_folder(save)} is missing, or its metadata say nothing")
        earlier = max((iteration for iteration in complete if iteration < step), default=None)
        if of_reference and earlier is not None and reference_folder(save, earlier) == reference:
            raise DataError(
                f"the reference of step {step} is damaged, and those before it have the same: {_told(of_reference)}. Restore "
                f"it from a copy, or start a new run from the weights with --pretrained-checkpoint {save} and another --save"
            )
        found += of_reference
        if not found:
            return
        told = _told(found)
        if earlier is None:
            raise DataError(f"the checkpoint of step {step} is damaged, and there is none before it: {told}")
        if not last_whole:
            raise DataError(
                f"the checkpoint of step {step} is damaged: {told}. Before it there is that of step {earlier}: the same "
                "command with --load-last-whole continues from the last one that is whole"
            )
        ranks.all_gather(None)  # everyone has looked
        if rank == 0:
            for line in [*found, *go_back(save, step)]:
                say(f"checkpoint: {line}")
        ranks.all_gather(None)


def require_whole_weights(folder: Path, ranks: Ranks, rank: int) -> None:
    """The same of the checkpoint that --pretrained-checkpoint names. Collective. Raises DataError."""
    source = weights_folder(folder)
    if found := _damages(source if source.is_dir() else None, ranks, rank):
        raise DataError(f"--pretrained-checkpoint {folder} is damaged: {_told(found)}")


def _damages(folder: Path | None, ranks: Ranks, rank: int) -> list[str]:
    """What is damaged in it, found by all ranks together, for all of them. Collective, also where a rank sees no folder."""
    parts = len(ranks.all_gather(None))
    mine = [] if folder is None else damages(folder, rank, parts)
    return [line for part in ranks.all_gather(mine) for line in part]


def _told(found: list[str]) -> str:
    return "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


@contextlib.contextmanager
def saving_explained(save: Path, step: int) -> Iterator[None]:
    """Turn what a failed save raises into a DiskError in a line, when it is the disk's fault.

    Megatron's writers report the errors of all ranks as text, to rank 0 alone; the others only learn that one failed.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        reason = _disk_reason(error, save)
        if reason is None:
            raise
        safe = max((iteration for iteration in complete_checkpoints(save) if iteration < step), default=None)
        kept = "no step is saved yet" if safe is None else f"step {safe} is safe"
        raise DiskError(
            f"{save}: {reason} while step {step} was saved; {kept}. Free some space, then the same command continues there"
        ) from error


def _disk_reason(error: BaseException, save: Path) -> str | None:
    """In words, when `error` comes of a full disk."""
    text = str(error)
    for number in FULL:
        words = os.strerror(number)
        if words in text or (isinstance(error, OSError) and error.errno == number):
            return words[0].lower() + words[1:]
    if not isinstance(error, CheckpointException):
        return None
    # torch's own writer of archives does not say why the disk took no more.
    space = os.statvfs(save)
    left = space.f_bavail * space.f_frsize
    return f"no space left on device ({left:,} bytes)" if space.f_bavail < space.f_blocks / 100 else None
