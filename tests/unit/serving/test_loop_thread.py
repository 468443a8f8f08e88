"""An event loop that goes on while its owner does something else."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from megatron_sip.serving.loop_thread import LoopThread
from megatron_sip.stop_signal import StopSignal


def test_what_a_coroutine_left_running_goes_on_between_calls() -> None:
    loop = LoopThread("test")
    done = threading.Event()

    async def leave() -> None:
        async def work() -> None:
            await asyncio.sleep(0.01)
            done.set()

        loop.task = asyncio.create_task(work())  # type: ignore[attr-defined]

    loop.run(leave())
    assert done.wait(5.0)
    loop.close()
    loop.close()


@pytest.mark.parametrize("kind", [ZeroDivisionError, TimeoutError, SystemExit])
def test_errors_come_back_to_the_caller_and_the_loop_goes_on(kind: type[BaseException]) -> None:
    loop = LoopThread("test")

    async def fail() -> None:
        raise kind("here")

    with pytest.raises(kind, match="here"):
        loop.run(fail())
    assert loop.run(asyncio.sleep(0, "still there")) == "still there"
    loop.close()


def test_a_stop_signal_reaches_the_caller_and_ends_the_wait() -> None:
    loop = LoopThread("test")
    with StopSignal() as stop:
        timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM])
        timer.start()
        started = time.monotonic()
        assert loop.run(stop.run(asyncio.sleep(60))) is None
        assert time.monotonic() - started < 10
    loop.close()


def test_closing_cancels_what_is_left() -> None:
    loop = LoopThread("test")
    cancelled = threading.Event()

    async def leave() -> None:
        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()

        loop.task = asyncio.create_task(work())  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    loop.run(leave())
    loop.close()
    assert cancelled.is_set()


def test_a_loop_that_has_ended_is_an_error_and_no_endless_wait() -> None:
    loop = LoopThread("test")

    async def end_the_loop() -> None:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(60)

    with pytest.raises(RuntimeError, match="has ended"):
        loop.run(end_the_loop())
    loop.close()
