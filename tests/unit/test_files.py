"""write_atomically: the old content or the new, nothing else left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_sip.files import write_atomically


def test_replaces_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, "naïve")
    assert path.read_text(encoding="utf-8") == "naïve"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
