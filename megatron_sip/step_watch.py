"""Ends a process whose step makes no progress, and says what it was doing: a run that hangs must not idle a cluster for days.

What is killed is safe: checkpoints are atomic, and the same command, or the job that restarts, goes on at the last one.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from typing import Self

from megatron_sip.console import say

STATUS = 75
"""The exit status, sysexits.h's of a temporary failure. examples/slurm_job.sh starts again, torchrun with --max-restarts."""
BLIND_S = 60.0
"""After which the process ends also when no Python can run, because a thread of C++ holds the interpreter's lock: with 1."""
LOG_DESCRIPTOR = 2
"""Where `console.quiet` sends this process's log."""


class StepWatch:
    """A thread that ends the process `limit_s` seconds after the last `begins`; 0: never. A context manager.

    It says what had begun and what was being `doing`, on the screen, and writes the stacks of all threads into the log.
    """

    def __init__(self, limit_s: float, log: str, rank: int = 0, blind_s: float = BLIND_S) -> None:
        """log: where the stacks are, for people."""
        self._limit_s = limit_s
        self._log = log
        self._rank = rank
        self._blind_s = blind_s
        self._what = self._phase = ""
        self._began = time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="step watch", daemon=True)

    def __enter__(self) -> Self:
        if self._limit_s:
            self._thread.start()
            self.begins("the first step")
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit_s:
            self._left.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def begins(self, what: str) -> None:
        """Something begins that has the whole time again: a step, or what it may wait for long, such as a checkpoint."""
        self._what = self._phase = what
        self._began = time.monotonic()
        if self._thread.is_alive():
            faulthandler.dump_traceback_later(self._limit_s + self._blind_s, exit=True, file=LOG_DESCRIPTOR)

    def doing(self, phase: str) -> None:
        """What it does from now on, within its time."""
        self._phase = phase

    def is_late(self, now: float) -> bool:
        """Whether what has begun should have ended by `now`, of time.monotonic()."""
        return now - self._began > self._limit_s

    def _watch(self) -> None:
        while not self._left.wait(min(1.0, self._limit_s / 10)):
            if self.is_late(time.monotonic()):
                say(
                    f"error: {self._what} did not end within --step-timeout {self._limit_s:g} s: rank {self._rank} was still "
                    f"at {self._phase}. The stacks of its threads are in {self._log}; the process ends with status {STATUS}, "
                    "and the same command continues at the last checkpoint"
                )
                faulthandler.dump_traceback(LOG_DESCRIPTOR)
                os._exit(STATUS)
