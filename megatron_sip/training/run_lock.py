"""One run a folder: a lock file that says who holds it, and that a killed run cannot leave in the way.

The file `run.lock` names host, process and job, and its time stamp is renewed while the run lives. Whoever finds one of
the same machine looks for the process; one of another machine is watched for a while: no time stamp that moves, no run.
A job that the scheduler starts again knows that its former self is gone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from megatron_sip.console import say
from megatron_sip.errors import DataError

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0
WATCH_SECONDS = 40.0
"""How long the lock of another machine is watched: longer than a loaded file system keeps a heartbeat back."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds a lock. `machine` tells boots and containers apart, `started` processes with one number."""

    host: str
    machine: str
    pid: int
    started: int
    job: str | None
    restarts: int
    since: str

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        return cls(
            host=socket.gethostname(),
            machine=f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}",
            pid=os.getpid(),
            started=_start_time(os.getpid()) or 0,
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )


class RunLock:
    """While entered no other run gets `folder`; entering raises DataError when one has it."""

    def __init__(
        self, folder: Path, *, watch_seconds: float = WATCH_SECONDS, beat_seconds: float = BEAT_SECONDS
    ) -> None:
        self.path = folder / LOCK_FILE
        self._watch_seconds = watch_seconds
        self._beat_seconds = beat_seconds
        self._content = json.dumps(asdict(Owner.this())) + "\n"
        self._released = threading.Event()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._created():
            self._remove_if_stale()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        if _read(self.path) == self._content:
            self.path.unlink(missing_ok=True)

    def _created(self) -> bool:
        try:
            with self.path.open("x") as file:
                file.write(self._content)
        except FileExistsError:
            return False
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _remove_if_stale(self) -> None:
        content = _read(self.path)
        if content is None:
            return
        owner = _owner(content)
        if self._is_alive(owner):
            raise DataError(
                f"{self.path.parent} is in use by {_name(owner)}: stop that run or wait for its end, or give this one other "
                f"--save and --run-dir folders; if that process is certainly gone, remove {self.path}"
            )
        say(f"{self.path}: its run ({_name(owner)}) is gone, the folder is taken over")
        aside = self.path.with_name(f".{LOCK_FILE}.stale.{socket.gethostname()}.{os.getpid()}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != content:  # another run was quicker, and this is its lock
            aside.rename(self.path)
        aside.unlink(missing_ok=True)

    def _is_alive(self, owner: Owner | None) -> bool:
        mine = Owner.this()
        if owner is not None and owner.machine == mine.machine:
            return _start_time(owner.pid) == owner.started
        if owner is not None and owner.job is not None and owner.job == mine.job and owner.restarts < mine.restarts:
            return False
        say(f"{self.path} is of {_name(owner)}: watching for {self._watch_seconds:g} s whether it lives")
        first, deadline = _time_stamp(self.path), time.monotonic() + self._watch_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_seconds))
            if (stamp := _time_stamp(self.path)) != first:
                return stamp is not None  # it may have ended meanwhile
        return False

    def _beat(self) -> None:
        while not self._released.wait(self._beat_seconds):
            try:
                os.utime(self.path)  # takes no space: a full disk does not end it
            except OSError:
                continue


def _owner(content: str) -> Owner | None:
    """Who wrote `content`; None when that cannot be told."""
    try:
        record = json.loads(content)
        return Owner(**{field.name: record[field.name] for field in fields(Owner)})
    except (ValueError, KeyError, TypeError):
        return None


def _name(owner: Owner | None) -> str:
    return "a process that it does not name" if owner is None else str(owner)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _time_stamp(path: Path) -> int | None:
    """When the lock was renewed, None when it is gone; opened, because a network file system may know an old stamp."""
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _start_time(pid: int) -> int | None:
    """When process `pid` started, in ticks since boot; None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if stat[0] in "ZX" else int(stat[19])
