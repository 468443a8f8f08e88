"""An asyncio event loop in a thread of its own, so that requests go on while the calling thread trains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

SIGNALS_SECONDS = 0.25


class LoopThread:
    """Runs coroutines for the thread that made it; what they leave running goes on until `close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the wait for it is interrupted. Signal handlers still run."""
        return self.wait(self.begin(work))

    def begin[T](self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work`; `wait` has its result."""
        return asyncio.run_coroutine_threadsafe(_outcome(work), self._loop)  # type: ignore[arg-type]

    def wait[T](self, future: Future[T]) -> T:
        """The result of what was begun here; see `run`."""
        try:
            # A signal may be delivered to another thread: its handler runs here when we wake up.
            while not wait([future], timeout=SIGNALS_SECONDS).done:
                if not self._thread.is_alive():
                    raise RuntimeError("the event loop's thread has ended; its traceback stands above")
            outcome = future.result()
        except BaseException:
            future.cancel()
            raise
        if isinstance(outcome, _Exit):
            raise outcome.error
        return outcome

    def cancel_rest(self) -> None:
        """Cancel what earlier coroutines left running, and wait until it has ended."""
        self.run(_cancel_others())

    def close(self) -> None:
        """Cancel what is left and end the thread. Safe to repeat."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self.cancel_rest()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@dataclass(frozen=True, slots=True)
class _Exit:
    error: SystemExit


async def _outcome[T](work: Coroutine[Any, Any, T]) -> T | _Exit:
    """What `work` returns; a SystemExit as a value, since raised in a task it would end the loop instead."""
    try:
        return await work
    except SystemExit as error:
        return _Exit(error)


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
