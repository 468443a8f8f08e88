"""Work in a thread that may never end: a future like an executor's, but nobody waits for the thread at exit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_daemon_thread[Result](work: Callable[[], Result], name: str) -> Future[Result]:
    """Start `work` in a thread of its own; the future gets what it returns or raises."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
