"""The trainer's processes on this node: started together, ended together, reached by this process's signals.

torchrun would do to start them, but it gives a process 30 s between SIGTERM and SIGKILL, in which a large model is not saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from megatron_sip.child_processes import kill_with_parent
from megatron_sip.serving.launch import reserve_port

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""For the others, once one of the processes has failed: they wait for it in vain."""


class LocalRanks:
    """`count` processes of one command, with the environment that torch.distributed reads."""

    def __init__(self, command: Sequence[str], count: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self._reserved = reserve_port() if count > 1 else None  # where their store listens
        # In sessions of their own: a Ctrl-C of the terminal comes to them once, through us.
        self._processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **(environment or {}), **variables},
                start_new_session=True,
                preexec_fn=kill_with_parent,
            )
            for variables in rank_variables(count, self._reserved)
        ]

    def wait(self) -> int:
        """The first status that is not 0, or 0 when all have ended well; signals go on to the processes meanwhile."""
        with self._reserved or contextlib.nullcontext(), self._signals_forwarded():
            while True:
                statuses = [process.poll() for process in self._processes]
                failed = next((status for status in statuses if status), 0)
                if failed:
                    self._end()
                if failed or None not in statuses:
                    return failed
                time.sleep(POLL_SECONDS)

    def _end(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def _signals_forwarded(self) -> Iterator[None]:
        def forward(number: int, frame: FrameType | None) -> None:
            for process in self._processes:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

        previous = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def rank_variables(count: int, store: socket.socket | None) -> list[dict[str, str]]:
    """What tells each of `count` processes which one it is and at which port their store is; nothing for a single one."""
    if store is None:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
