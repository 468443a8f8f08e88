"""A command of `prepare` that is killed at one place after another until it ends by itself."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

from forks import forks
from prepare_cases import run


def run_until_killed(words: tuple[str | Path, ...], number: int, after: bool) -> None:
    """Run a command in this process, which kills itself (SIGKILL) at its `number`-th file that gets a name."""
    calls = 0

    def killing(name: str) -> None:
        original = getattr(Path, name)

        def move(path: Path, target: Path) -> Path:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            moved = original(path, target)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return moved

        setattr(Path, name, move)

    for name in ("rename", "replace"):
        killing(name)
    run(*words)


def kills_survived(*words: str | Path) -> int:
    """How often a command was killed, each time at a later step of its own and begun again, before it ended."""
    context = forks()
    for number in itertools.count(1):
        process = context.Process(target=run_until_killed, args=(words, number, number % 2 == 0))
        process.start()
        process.join(300)
        process.kill()  # one that hangs, whose exit code is none
        if process.exitcode == 0:
            return number - 1
        assert process.exitcode == -signal.SIGKILL, f"kill {number}: {process.exitcode}"
    raise AssertionError
