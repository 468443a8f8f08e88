"""SIGTERM as a request: finish what is safe, save, exit 0. SLURM and torchrun send it before they kill.

Ctrl-C (SIGINT) is the same request, and a second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, Self

from megatron_sip.console import error_descriptor

POLL_SECONDS = 0.25
INTERRUPTED = (
    b"\nCtrl-C: the run will save its last finished step and end; Ctrl-C again ends it at once, without saving\n"
)


class StopSignal:
    """While entered, SIGTERM (and SIGUSR1, which SLURM's --signal can send early, and Ctrl-C) only sets `requested`."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        """Why this process itself asked for it; empty after a signal."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @classmethod
    @contextmanager
    def kept_from_children(cls) -> Iterator[None]:
        """Processes started inside never see these signals, which SLURM, `timeout` and terminals send to process groups."""
        resource_tracker.ensure_running()  # multiprocessing unblocks SIGTERM when it starts this one
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, cls.SIGNALS)  # a mask is inherited, unlike a handler
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def request(self, reason: str) -> None:
        """The same request by this process, for a `reason` for which its run must end; from any thread."""
        self.reason = self.reason or reason
        self.requested = True

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one must not wait for Python to run a handler
            os.write(error_descriptor(), INTERRUPTED)  # print is not safe here: it may be the one that was interrupted

    async def run[T](self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of `work`, or None, with `work` cancelled, once a stop is requested."""
        task = asyncio.ensure_future(work)
        try:
            while not self.requested:
                done, _ = await asyncio.wait({task}, timeout=POLL_SECONDS)
                if done:
                    return task.result()
        finally:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
