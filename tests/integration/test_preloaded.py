"""Programs that start from a process with the imports done find what those find that Python itself starts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import preloaded
import pytest
from workers import launch, run_program

PROBE = """
import atexit, json, os, signal, sys, threading
atexit.register(print, "the end")
signals = signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE
found = {
    "arguments": sys.argv, "name": __name__, "first": sys.path[0],
    "folder": os.getcwd(), "environment": dict(os.environ), "input": sys.stdin.read(),
    "leads": os.getsid(0) == os.getpid(), "threads": threading.active_count(),
    "signals": [str(signal.getsignal(number)) for number in signals],
    "main": [sys.modules["__main__"].__dict__ is globals(), __spec__ and __spec__.name],
}
print(json.dumps(found))
sys.exit(int(sys.argv[1]))
"""
RANKS = """
import os, sys, time
rank = int(os.environ["RANK"])
print(rank, os.environ["WORLD_SIZE"], flush=True)
time.sleep(0 if rank else 600)  # longer than anybody waits for it
sys.exit(rank)
"""


@pytest.mark.parametrize("module", [False, True])
def test_a_program_finds_what_python_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: bool) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.chdir(tmp_path)
    program = ("-m", "probe") if module else (str(tmp_path / "probe.py"),)
    fresh, forked = (run_program(*program, "7", "a word", fresh=fresh) for fresh in (True, False))
    assert fresh.returncode == forked.returncode == 7
    (expected, *after), (found, *then) = fresh.stdout.splitlines(), forked.stdout.splitlines()
    assert after == then == ["the end"]
    assert read(found) == read(expected)


def read(line: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(line)
    assert found["leads"]
    assert found["threads"] == 1
    found["environment"] = {
        name: value for name, value in found["environment"].items() if name not in preloaded.NOT_PROGRAM_S
    }
    return found


def test_ranks_are_told_their_places_and_end_with_the_first_that_fails(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    done = run_program(str(tmp_path / "ranks.py"), processes=2)
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == ["0 2", "1 2"]


def test_a_signal_ends_what_was_started(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text("import time; time.sleep(60)")
    with tempfile.TemporaryFile() as output:
        process = launch(str(tmp_path / "sleep.py"), output=output)
        assert isinstance(process, preloaded.Started)
        assert process.poll() is None
        process.kill()
        assert process.wait(10) == process.poll() == -9


def test_another_environment_is_a_start_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    with tempfile.TemporaryFile() as output:
        assert preloaded.start(("program.py",), output) is None
