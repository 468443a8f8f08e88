"""What the user sees: our own lines on the screen, everything else in a log file that is named there.

    with quiet(Path("run/logs/output.log")):
        say("step 1/32 ...")     # on the screen, and in the log
        print("noise")           # in the log alone, as is what C++ and child processes write

The redirection is of the file descriptors 1 and 2, so it holds for whatever this process runs. Without `quiet` (and with
--verbose) `say` is print.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import sys
import tempfile
from collections.abc import Buffer, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

PACKAGE = "megatron_sip"
TAIL_LINES = 20
"""Of the log, shown when the process ends by an unexpected error."""
TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Screen:
    """Duplicates of the descriptors that standard output and standard error had."""

    output: TextIO
    errors: TextIO


_screen: _Screen | None = None
"""None while nothing is redirected."""


def say(text: str) -> None:
    """One of our own lines: on the screen, and in the log when there is one."""
    if _screen is not None:
        _write(_screen.output, text)
    print(text, flush=True)


def error_descriptor() -> int:
    """Where a signal handler may write to be seen."""
    return 2 if _screen is None else _screen.errors.fileno()


class _Lenient(io.FileIO):
    """Loses what a full disk does not take: no library expects print to fail."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _logging_stream(descriptor: int) -> TextIO:
    """A text stream to a descriptor, written line by line: in order with what C++ and child processes write."""
    raw = io.BufferedWriter(_Lenient(descriptor, "wb", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


class _ShowWarnings(logging.Handler):
    """Shows this package's own warnings on the screen, and keeps them in the log."""

    def emit(self, record: logging.LogRecord) -> None:
        if _screen is not None:
            _write(_screen.errors, f"warning: {record.getMessage()}")
        print(self.format(record), file=sys.stderr, flush=True)


def _write(stream: TextIO, text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed must not end a run
        stream.write(text + "\n")
        stream.flush()


def bars() -> TextIO:
    """Where progress bars belong: the terminal, when there is one to move a bar on, else standard error."""
    if _screen is not None and _screen.errors.isatty():
        return _screen.errors
    return sys.stderr


@contextlib.contextmanager
def quiet(log: Path | None, *, announce: bool = True) -> Iterator[None]:
    """Send what is written on the descriptors 1 and 2 to the end of `log` (None: to nowhere that stays), until the exit.

    An unexpected error shows the end of the log on the screen before it goes on its way; its traceback and the message of
    a SystemExit follow, since the descriptors are back by then. So does the traceback of a crash in C++. `announce`:
    name the log on the screen.

    Raises:
        OSError: the log cannot be written.
    """
    global _screen
    with _open_log(log) as file, contextlib.ExitStack() as stack:
        screen = _Screen(*(stack.enter_context(_duplicate(descriptor)) for descriptor in (1, 2)))
        if log is not None and announce:
            _write(screen.output, f"log: {log} (--verbose shows it here)")
        start = file.seek(0, os.SEEK_END)
        previous, _screen = _screen, screen
        _point(file.fileno(), file.fileno())
        stack.enter_context(contextlib.redirect_stdout(_logging_stream(1)))
        stack.enter_context(contextlib.redirect_stderr(_logging_stream(2)))
        faulthandler.enable(screen.errors)
        warnings = _ShowWarnings(logging.WARNING)
        logging.getLogger(PACKAGE).addHandler(warnings)
        try:
            yield
        except BaseException as error:
            _flush()
            if not isinstance(error, SystemExit | KeyboardInterrupt):
                _show_tail(screen.errors, file, start, log)
            raise
        finally:
            _flush()
            faulthandler.disable()
            logging.getLogger(PACKAGE).removeHandler(warnings)
            _point(screen.output.fileno(), screen.errors.fileno())
            _screen = previous


def _open_log(log: Path | None) -> IO[bytes]:
    if log is None:
        return tempfile.TemporaryFile("a+b")
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("a+b")


def _duplicate(descriptor: int) -> TextIO:
    _flush()
    return os.fdopen(os.dup(descriptor), "w", encoding="utf-8", errors="replace")


def _point(output: int, errors: int) -> None:
    os.dup2(output, 1)
    os.dup2(errors, 2)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _show_tail(screen: TextIO, file: IO[bytes], start: int, log: Path | None) -> None:
    """The last lines that this process logged."""
    lines = log_tail(file, start)
    if lines:
        where = f" of {log}" if log is not None else ""
        _write(screen, "\n".join([f"--- the last lines{where}:", *lines, "---"]))


def log_tail(file: IO[bytes], start: int = 0, count: int = TAIL_LINES) -> list[str]:
    """The last `count` lines of a file behind byte `start`, decoded leniently; of a progress bar its last state."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(start, end - TAIL_BYTES))
    lines = file.read().decode(errors="replace").splitlines()
    return lines[-count:]
