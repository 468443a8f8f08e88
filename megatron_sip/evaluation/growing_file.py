"""JSON lines that grow task by task and are continued after a kill: a header that says what they are of, then a line a task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.errors import DataError
from megatron_sip.files import read_json_lines


def begin(path: Path, header: Mapping[str, Any], what: str) -> int:
    """Make `path`, or cut off a line that a kill left half written; returns how many lines follow its header.

    header: with "format". Raises DataError when `path` is not `what`, or of another header.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    if not whole:  # new, or killed in its first line
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, [header])
        return 0
    values = read_json_lines(path, what)
    found, expected = values[0], json.loads(json.dumps(dict(header)))
    if not isinstance(found, dict) or found.get("format") != header["format"]:
        raise DataError(f"{path}: no {what}; name another file")
    differing = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise DataError(
            f"{path}, {what}, was made with {name} {found.get(name)!r}, not {expected.get(name)!r}: name another file, or "
            "remove it"
        )
    return len(values) - 1


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, and make them outlast a power cut."""
    with path.open("ab") as file:
        lines = (json.dumps(dict(record), ensure_ascii=False) + "\n" for record in records)
        file.write("".join(lines).encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())
