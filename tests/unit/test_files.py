"""Files and folders are there as a whole or not at all, and nothing else is left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_sip.files import move_into_place, write_atomically


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


def test_a_folder_is_moved_once_all_its_files_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, final = tmp_path / "staged", tmp_path / "final"
    (staged / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (staged / name).write_text(name)
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    move_into_place(staged, final)
    assert sorted(synced[:-1]) == ["staged", "staged/a", "staged/inner", "staged/inner/b"]
    assert synced[-1] == "."  # the new name, after the rename
    assert (final / "inner" / "b").read_text() == "inner/b"
    assert list(tmp_path.iterdir()) == [final]
    (staged / "more").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        move_into_place(staged, final)
    assert (staged / "more").is_dir()
