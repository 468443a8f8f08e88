"""Two runs never share a folder, and no killed run keeps the next one out."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_sip.errors import ArgumentError, DataError
from megatron_sip.train import lock_folders
from megatron_sip.training.run_lock import LOCK_FILE, Owner, RunLock

HOLD = """
import sys, time
from pathlib import Path
from megatron_sip.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def leave_lock(folder: Path, owner: Owner) -> Path:
    path = folder / LOCK_FILE
    path.write_text(json.dumps(asdict(owner)))
    return path


def elsewhere(**changes: object) -> Owner:
    """A run on another machine."""
    return replace(Owner.this(), host="node7", machine="another boot", pid=4711, **changes)  # type: ignore[arg-type]


def quick(folder: Path) -> RunLock:
    return RunLock(folder, watch_seconds=0.3, beat_seconds=0.02)


def test_a_second_run_is_refused_and_the_folder_is_free_after_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with quick(folder), pytest.raises(DataError, match=rf"{folder} is in use by process {os.getpid()} on .*, since 20"):
        quick(folder).__enter__()
    assert list(folder.iterdir()) == []
    with quick(folder):
        pass


def test_a_killed_run_of_this_machine_is_told_apart_from_a_living_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(DataError, match=f"process {process.pid} on .*, SLURM job 815, since"):
        quick(tmp_path).__enter__()
    process.kill()
    while quick(tmp_path)._is_alive(Owner(**json.loads((tmp_path / LOCK_FILE).read_text()))):  # it dies on its own time
        time.sleep(0.01)
    with quick(tmp_path):  # though the process is not reaped yet
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"its run (process {process.pid} on" in capsys.readouterr().out
    process.wait()


def test_another_process_under_the_number_of_the_old_one_is_not_taken_for_it(tmp_path: Path) -> None:
    leave_lock(tmp_path, replace(Owner.this(), started=1))
    with quick(tmp_path):
        pass


def test_a_run_of_another_machine_lives_as_long_as_its_time_stamp_moves(tmp_path: Path) -> None:
    path = leave_lock(tmp_path, elsewhere())
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            os.utime(path)

    beats = threading.Thread(target=beat)
    beats.start()
    try:
        with pytest.raises(DataError, match="process 4711 on node7"):
            quick(tmp_path).__enter__()
    finally:
        ended.set()
        beats.join()
    with quick(tmp_path):
        pass


def test_a_run_that_ends_while_it_is_watched_is_no_longer_in_the_way(tmp_path: Path) -> None:
    path = leave_lock(tmp_path, elsewhere())
    end = threading.Timer(0.1, path.unlink)
    end.start()
    with RunLock(tmp_path, watch_seconds=30.0, beat_seconds=0.02):
        end.join()


def test_the_time_stamp_of_a_held_lock_moves(tmp_path: Path) -> None:
    with quick(tmp_path) as lock:
        os.utime(lock.path, (1.0, 1.0))
        deadline = time.monotonic() + 10.0
        while lock.path.stat().st_mtime < 2.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_requeued_job_knows_that_its_former_self_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lock(tmp_path, elsewhere(job="815", restarts=1))
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with RunLock(tmp_path, watch_seconds=3600.0):
        pass


@pytest.mark.parametrize("content", ["", "{}", "not json", "[1]"])
def test_a_lock_that_names_nobody_is_taken_over_once_it_does_not_move(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with quick(tmp_path):
        pass


def test_checkpoints_and_metrics_are_both_kept_from_a_second_run(tmp_path: Path) -> None:
    first = argparse.Namespace(save=str(tmp_path / "a"), run_dir=str(tmp_path / "m"))
    with contextlib.ExitStack() as stack:
        lock_folders(first, stack)
        for taken in (
            {"save": first.save, "run_dir": str(tmp_path / "b")},
            {"save": str(tmp_path / "b"), "run_dir": first.run_dir},
        ):
            with pytest.raises(ArgumentError, match="is in use by"), contextlib.ExitStack() as second:
                lock_folders(argparse.Namespace(**taken), second)
    with contextlib.ExitStack() as stack:
        lock_folders(argparse.Namespace(save=first.save, run_dir=first.save), stack)  # one folder, one lock
