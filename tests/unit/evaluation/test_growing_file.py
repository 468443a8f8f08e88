"""A file of lines that grows is one process's at a time."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from megatron_sip.errors import DataError
from megatron_sip.evaluation.growing_file import alone, append, begin

HEADER = {"format": "lines"}


def add(path: Path) -> None:
    """As another process: exits with 3 when it may not."""
    try:
        with alone(path):
            append(path, [{"line": begin(path, HEADER, "lines")}])
    except DataError as error:
        raise SystemExit(3 if "another process is adding to it" in str(error) else 4) from None


def test_two_processes_do_not_add_the_same_lines(tmp_path: Path) -> None:
    path, context = tmp_path / "new" / "lines.jsonl", multiprocessing.get_context("fork")
    with alone(path):
        append(path, [{"line": begin(path, HEADER, "lines")}])
        other = context.Process(target=add, args=(path,))
        other.start()
        other.join()
        assert other.exitcode == 3
    add(path)
    assert path.read_text().splitlines() == ['{"format": "lines"}', '{"line": 0}', '{"line": 1}']
    with pytest.raises(DataError, match="lines with"):
        begin(path, {**HEADER, "model": "other"}, "lines")
