"""Runs of `python -m megatron_sip.train` for the tests of whole runs: by its command line, or with the imports done."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from preloaded import Started
from workers import group_members, launch

START_SECONDS = 300.0

COMMON = (
    *("--split", "70,0,30", "--seq-length", "96", "--suffix-length", "24", "--row-length", "360"),
    *("--global-batch-size", "4", "--lr", "1e-3", "--lr-decay-style", "constant", "--logging-level", "40"),
)


def start(run: Path, *flags: str, processes: int = 1, fresh: bool = False) -> subprocess.Popen[Any] | Started:
    """Start a run in the background, in a process group of its own; what it would show on a screen goes to RUN.log."""
    program = ("-m", "megatron_sip.train", *COMMON, "--save", str(run), *flags)
    with run.with_suffix(".log").open("ab") as log:
        return launch(*program, output=log, processes=processes, fresh=fresh)


def screen(run: Path) -> str:
    """What all starts of a run have shown."""
    return run.with_suffix(".log").read_text(errors="replace")


def output(run: Path) -> str:
    """What all starts of a run have logged and, behind it, shown: at its end stands why the last one ended."""
    logs = sorted((run / "logs").glob("output*.log"))
    return "".join(log.read_text(errors="replace") for log in logs) + screen(run)


def train(run: Path, *flags: str, processes: int = 1, fresh: bool = False) -> str:
    """Run to the end and return its output; fails with it when the exit status is not 0."""
    status = start(run, *flags, processes=processes, fresh=fresh).wait(START_SECONDS)
    assert status == 0, f"exit status {status}:\n{output(run)[-6000:]}"
    return output(run)


def refused(run: Path, *flags: str) -> str:
    """Run what must be refused, on the screen and without a traceback; returns the output."""
    return why_refused(run, start(run, *flags))


def why_refused(run: Path, process: subprocess.Popen[Any] | Started) -> str:
    """What such a run shows, once it has ended."""
    status = process.wait(120.0)
    assert status not in (0, None), output(run)[-6000:]
    assert "Traceback" not in output(run), output(run)[-6000:]
    return output(run)


def lines(run: Path) -> list[str]:
    """The complete lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps(run: Path) -> list[dict[str, Any]]:
    """What the lines of metrics.jsonl hold."""
    return [json.loads(line) for line in lines(run)]


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 before the first."""
    return max((record["step"] for record in steps(run)), default=0)


def tracked(run: Path) -> int | None:
    """The iteration of the last committed checkpoint."""
    tracker = run / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else None


def wait_until(
    reached: Callable[[], bool], run: Path, process: subprocess.Popen[Any] | Started, timeout: float = START_SECONDS
) -> None:
    """Return as soon as `reached()`; fails when the run ends before."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert process.poll() is None, output(run)[-6000:]
        assert time.monotonic() < deadline, f"what was waited for did not come within {timeout:.0f} s"
        time.sleep(0.002)  # a save of a small model takes a fraction of a second, and a test waits for its middle


def kill_when(run: Path, reached: Callable[[], bool], *flags: str) -> None:
    """Start a run and kill -9 it as soon as `reached()`; returns when none of its helpers is left."""
    process = start(run, *flags)
    wait_until(reached, run, process)
    process.kill()
    process.wait()
    wait_for_end_of_group(process.pid)


LEARNT = (
    *("loss", "grad_norm", "score/suffix", "score/rollout", "chosen_rate/rollout", "reward_margin"),
    *("reward_accuracy", "rollout_logratio"),
)


def wait_for_end_of_group(group: int, timeout: float = 30.0) -> None:
    """Until no process of a run that was started here is left; fails when its helpers outlive it."""
    deadline = time.monotonic() + timeout
    while left := group_members(group):
        assert time.monotonic() < deadline, f"of group {group} {left} live {timeout:g} s after its leader was killed"
        time.sleep(0.1)


def learnt(records: Sequence[dict[str, Any]]) -> list[list[float]]:
    """What each step computed, without durations and counters; fails when a step lacks one of LEARNT or there is no step.

    What two runs both lack must not make them equal.
    """
    assert records, "no step was recorded"
    for record in records:
        missing = [name for name in LEARNT if name not in record]
        assert not missing, f"step {record['step']} has no {', '.join(missing)}"
    return [[record["step"], *(record[name] for name in LEARNT)] for record in records]
