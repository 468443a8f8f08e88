"""JSON lines that grow task by task and are continued after a kill: a header that says what they are of, then a line a task."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from megatron_sip.errors import DataError
from megatron_sip.files import described


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Meanwhile no other process of this machine adds to `path`. Raises DataError where one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except filelock.Timeout as error:
        raise DataError(f"{path}: another process is adding to it; wait for it, or name another file") from error


def begin(path: Path, header: Mapping[str, Any], what: str) -> int:
    """Make `path`, or cut off a line that a kill left half written; returns how many lines follow its header.

    header: with "format". Raises DataError when `path` is not `what`, or of another header; it is then as it was.
    """
    content, first = path.read_bytes() if path.exists() else b"", _line(header)
    if first.startswith(content) and content != first:  # new, or killed in its first line
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        append(path, [header])
        return 0
    with described(path, what):
        found, expected = json.loads(content.partition(b"\n")[0]), json.loads(first)
    if not isinstance(found, dict) or found.get("format") != header["format"]:
        raise DataError(f"{path} is not {what}: name another file")
    differing = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise DataError(
            f"{path} is {what} with {name} {found.get(name)!r}, not {expected.get(name)!r}: name another file, or remove it"
        )
    os.truncate(path, content.rfind(b"\n") + 1)
    return content.count(b"\n") - 1


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, and make them outlast a power cut."""
    with path.open("ab") as file:
        file.write(b"".join(map(_line, records)))
        file.flush()
        os.fsync(file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(record), ensure_ascii=False) + "\n").encode("utf-8", "replace")
