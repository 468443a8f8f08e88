"""Python functions that score candidates: which one a name means, and processes that hold and call it.

    def function(texts: list[str], prefix: str, reference: str) -> list[float | None]

A name is `package.module:function`, or what a package calls it in its entry points of the group `megatron_sip.criteria`.
Functions run in processes of their own: one that hangs is killed at its time-out, one that crashes costs its call, not the run.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from megatron_sip.errors import UserError
from megatron_sip.serving.patience import waits_until
from megatron_sip.stop_signal import StopSignal

log = logging.getLogger(__name__)

ENTRY_POINTS = "megatron_sip.criteria"
START_TIMEOUT_S = 300.0
"""For the import of a function's module, which may load a model."""
_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")

Function = Callable[[list[str], str, str], Sequence[float | None]]
Numbers = list[float | None]
Failed = Literal["timeout", "raised", "crashed"]


class FunctionError(UserError, ValueError):
    """A function that cannot be used, or that answers with something else than numbers; the message names it."""


class CallFailedError(Exception):
    """A call without an answer: it raised, took too long, or its process ended."""

    def __init__(self, kind: Failed, detail: str) -> None:
        super().__init__(detail)
        self.kind: Failed = kind


@cache
def named_functions() -> dict[str, str]:
    """The functions that installed packages offer: name -> package.module:function."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def function_path(name: str) -> str | None:
    """package.module:function of a criterion's name; None when it is not the name of a function."""
    if name in named_functions():
        return named_functions()[name]
    return name if _NAME.fullmatch(name) else None


def require_package(path: str) -> None:
    """Raises FunctionError where a function's package is neither installed nor in the current folder; nothing is imported,
    which may load a model."""
    here = str(Path.cwd())
    # A console script has its own folder there, `python -m` the current one.
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    package = re.split("[.:]", path)[0]
    try:
        found = find_spec(package) is not None
    except ValueError:  # a module without a spec
        found = False
    if not found:
        raise FunctionError(
            f"'{path}' cannot be imported: there is no module '{package}' that is installed or in {here}"
        )


def check_functions(paths: Iterable[str]) -> None:
    """Import each function in a process of its own, which then ends. Raises FunctionError that names it."""
    for path in paths:
        processes = FunctionProcesses(path, START_TIMEOUT_S, 1)
        try:
            asyncio.run(processes.start())
        finally:
            processes.close()


def load_function(path: str) -> Function:
    """Import a function. Raises FunctionError that names it."""
    module, _, attribute = path.partition(":")
    try:
        found = attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # whatever a module does when it is imported
        raise FunctionError(f"'{path}' cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise FunctionError(f"'{path}' is no function but a {type(found).__name__}")
    return found


def checked_numbers(path: str, answer: Any, count: int) -> Numbers:
    """What a function gave for `count` texts, as plain numbers. Raises FunctionError that names it."""
    try:
        values = list(answer)
    except TypeError:
        raise FunctionError(
            f"'{path}' gave a {type(answer).__name__}: one number or None for each text is needed"
        ) from None
    if len(values) != count:
        raise FunctionError(f"'{path}' gave {len(values)} numbers for {count} texts: one for each is needed")
    return [None if value is None else _number(path, value) for value in values]


def _number(path: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)  # an array's or a tensor's scalar too
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise FunctionError(f"'{path}' gave {value!r}: a number from 0 to 1, or None, is needed")
    return number


class FunctionProcesses:
    """Up to `processes` processes that call one function, each one call at a time; they start when they are needed."""

    def __init__(self, path: str, timeout_s: float, processes: int) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._workers = [_Worker(path) for _ in range(processes)]
        self._idle: asyncio.LifoQueue[_Worker] | None = None
        self.answered_at = -math.inf
        """When a call was last answered, of time.monotonic()."""

    async def start(self) -> None:
        """Raises FunctionError when the function cannot be imported in a process of its own."""
        try:
            await self.call([], "", "", START_TIMEOUT_S)
        except CallFailedError as failure:
            raise FunctionError(f"'{self._path}' cannot be imported: {failure}") from failure

    async def call(
        self,
        texts: list[str],
        prefix: str,
        reference: str,
        patience_s: float = math.inf,
        silence_s: float = math.inf,
    ) -> Numbers:
        """One number or None for each text. Without texts the function is not called.

        patience_s: the most that the call may take from now on, its wait for a process included. silence_s: how long it waits
        without an answer to any other call, see `waits_until`.

        Raises:
            CallFailedError: it raised, its process ended, or the time was up.
            FunctionError: it cannot be imported, or does not answer with one number from 0 to 1, or None, for each text.
        """
        if self._idle is None:
            self._idle = asyncio.LifoQueue()
            for worker in self._workers:
                self._idle.put_nowait(worker)
        until = time.monotonic() + patience_s
        worker = await self._free_worker(until, silence_s)
        try:
            limit = min(self._timeout_s, waits_until(until, silence_s, self.answered_at) - time.monotonic())
            numbers = await asyncio.to_thread(worker.call, texts, prefix, reference, limit)
            self.answered_at = time.monotonic()
            return numbers
        except _StartError as error:
            if self.answered_at == -math.inf:
                raise
            raise CallFailedError("crashed", f"its process does not start again: {error}") from error  # it did before
        except asyncio.CancelledError:
            worker.kill()  # its answer would be taken for that of the next call
            self._workers.remove(worker)
            worker = _Worker(self._path)
            self._workers.append(worker)
            raise
        finally:
            self._idle.put_nowait(worker)

    async def _free_worker(self, deadline: float, silence_s: float) -> _Worker:
        assert self._idle is not None
        while True:
            left = waits_until(deadline, silence_s, self.answered_at) - time.monotonic()
            try:
                return await asyncio.wait_for(self._idle.get(), None if left == math.inf else max(0.0, left))
            except TimeoutError:
                if waits_until(deadline, silence_s, self.answered_at) <= time.monotonic():
                    raise CallFailedError("timeout", "no process was free in time") from None

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()


class _StartError(FunctionError):
    """A process that cannot import the function."""


class _Worker:
    """One process, which is started again where it had to be killed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._process: Any = None
        self._pipe: Connection | None = None

    def call(self, texts: list[str], prefix: str, reference: str, timeout_s: float) -> Numbers:
        """See `FunctionProcesses.call`; blocks."""
        pipe = self._pipe if self._pipe is not None else self._start()
        if not texts:
            return []
        try:
            pipe.send((texts, prefix, reference))
        except OSError as error:
            self.kill()
            raise CallFailedError("crashed", f"its process is gone: {error}") from error
        kind, answer = self._answer(pipe, timeout_s)
        if kind == "raised":
            raise CallFailedError("raised", answer)
        if kind == "wrong":
            raise FunctionError(answer)
        return answer

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a copy of a process with threads may hang
        pipe, theirs = context.Pipe()
        self._process, self._pipe = context.Process(target=_serve, args=(self._path, theirs), daemon=True), pipe
        with StopSignal.kept_from_children():  # the run ends its processes itself, once its step is done or given up
            self._process.start()
        theirs.close()
        kind, answer = self._answer(pipe, START_TIMEOUT_S)
        if kind != "ready":
            self.kill()
            raise _StartError(answer)
        return pipe

    def _answer(self, pipe: Connection, timeout_s: float) -> tuple[str, Any]:
        try:
            if pipe.poll(max(0.0, timeout_s)):
                kind, answer = pipe.recv()
                return kind, answer
        except (EOFError, OSError) as error:
            self._process.join(1.0)  # its end of the pipe is closed a moment before
            code = self._process.exitcode
            self.kill()
            raise CallFailedError("crashed", f"its process ended (exit status {code})") from error
        self.kill()
        raise CallFailedError("timeout", f"it took more than {timeout_s:.0f} s")

    def kill(self) -> None:
        """End the process; the next call starts another."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if process is not None:
            process.kill()
            process.join()
        if pipe is not None:
            pipe.close()


def _serve(path: str, pipe: Connection) -> None:
    """What a process does: import the function, then answer calls until the other end is closed."""
    try:
        function = load_function(path)
    except FunctionError as error:
        pipe.send(("wrong", str(error)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            texts, prefix, reference = pipe.recv()
        except (EOFError, OSError):
            return
        answer: tuple[str, Any]
        try:
            answer = ("numbers", checked_numbers(path, function(texts, prefix, reference), len(texts)))
        except FunctionError as error:
            answer = ("wrong", str(error))
        except Exception as error:
            log.exception("'%s' raised", path)
            answer = ("raised", f"{type(error).__name__}: {error}")
        pipe.send(answer)
