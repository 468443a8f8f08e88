"""A process whose step hangs ends, with its stacks in the log and one line that says where it was."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_sip.step_watch import STATUS, StepWatch

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from megatron_sip.console import quiet
from megatron_sip.step_watch import StepWatch
def stuck_call():
    {stuck}
with quiet(Path(sys.argv[1])), StepWatch(0.3, sys.argv[1], rank=3, blind_s={blind_s}) as watch:
    watch.begins("step 7")
    watch.doing("training")
    stuck_call()
"""


def hang(log: Path, stuck: str, blind_s: float) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(stuck=stuck, blind_s=blind_s)
    return subprocess.run([sys.executable, "-c", program, str(log)], capture_output=True, text=True, timeout=60)


def test_a_step_that_hangs_ends_the_process_with_its_stacks_in_the_log_and_its_place_on_the_screen(
    tmp_path: Path,
) -> None:
    log = tmp_path / "output.log"
    ended = hang(log, "time.sleep(600)", 30.0)
    assert ended.returncode == STATUS
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("error")]
    assert line.startswith("error: step 7 did not end within --step-timeout 0.3 s: rank 3 was still at training.")
    assert str(log) in line
    assert "in stuck_call" in log.read_text()
    assert "in stuck_call" not in ended.stderr


def test_so_does_one_that_lets_no_python_run(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    ended = hang(log, "ctypes.PyDLL(None).usleep(600_000_000)", 0.3)  # which keeps the interpreter's lock
    assert ended.returncode == 1
    assert "in stuck_call" in log.read_text()


def test_what_begins_anew_has_the_whole_time_and_phases_share_it() -> None:
    watch = StepWatch(100.0, "log")
    watch.begins("step 1")
    before = time.monotonic()
    watch.doing("training")
    assert not watch.is_late(before + 99)
    assert watch.is_late(before + 101)
    watch.begins("saving step 1")
    assert not watch.is_late(time.monotonic() + 99)


def test_a_watch_that_is_left_ends_nothing_and_one_without_limit_has_no_thread() -> None:
    with StepWatch(0.05, "log"):
        pass
    with StepWatch(0.0, "log") as watch:
        watch.begins("step 1")
        time.sleep(0.1)
        assert "step watch" not in [thread.name for thread in threading.enumerate()]
