"""Files that are there as a whole or not at all, and files that are named when they cannot be read."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sip.errors import DataError, UserError


class DiskError(UserError, RuntimeError):
    """A disk did not take what a run must write; the message says where, and which step is safe."""


def staged_beside(path: Path) -> Path:
    """Where this process writes what becomes `path`; the name tells its machine, too, since nodes share folders."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def sweep_staged(folder: Path, whole: bool = False) -> None:
    """Remove what processes of this machine that are dead left half-written below `folder`; with `whole` what any left."""
    for path in folder.rglob(".*.partial"):
        of, _, process = path.name.removesuffix(".partial").rpartition(".")
        dead = of.endswith(f".{socket.gethostname()}") and process.isdigit() and not Path("/proc", process).exists()
        if whole or dead:
            path.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`: after a kill or a power cut it holds the old content or the new, never a part.

    Raises OSError; `path` is then as it was.
    """
    staged = staged_beside(path)
    try:
        with staged.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def described(path: Path | str, what: str) -> Iterator[None]:
    """Whatever the body stumbles over in the content of `path`, which should be `what`, becomes a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise DataError(
            f"{path} is not {what}, or only a part of it ({reason}): another file, or one cut short"
        ) from error


def read_json(path: Path, what: str) -> Any:
    """The JSON value in `path`, which should be `what`. Raises DataError."""
    with described(path, what):
        return json.loads(path.read_bytes())


def read_json_lines(path: Path, what: str) -> list[Any]:
    """The value of each line of `path` that is not empty. Raises DataError, which names the line."""
    values = []
    # Split as bytes: str.splitlines would also split at the line separators that text may contain.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            with described(f"{path}:{number}", what):
                values.append(json.loads(line))
    return values


def move_into_place(staged: Path, final: Path) -> None:
    """Rename a file or a folder of files whose writing is over: whatever happens, under `final` it is whole or not there.

    Raises OSError, as when `final` is a folder that is not empty; `staged` is then still there.
    """
    for path in (staged, *staged.rglob("*")):
        _sync(path)
    staged.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's names, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
