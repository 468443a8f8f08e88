"""What reaches the screen and what the log file: print, descriptors, child processes, crashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEADER = """
import logging, os, subprocess, sys
from pathlib import Path
from megatron_sip.console import quiet, say
log = Path(sys.argv[1])
"""


def run(code: str, log: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEADER + code, str(log)], capture_output=True, text=True, timeout=60, check=False
    )


def test_only_our_lines_reach_the_screen_and_all_lines_the_log_in_order(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "output.log"
    code = """
with quiet(log):
    print("noise of Python")
    say("ours")
    os.write(2, b"noise of C++\\n")
    subprocess.run(["echo", "noise of a child"])
    print("a warning", file=sys.stderr)
    logging.getLogger("megatron_sip.judge").warning("no verdict from %s", "http://judge")
    logging.getLogger("megatron.core").warning("noise of Megatron")
print("after")
"""
    done = run(code, log)
    assert done.stdout.splitlines() == [f"log: {log} (--verbose shows it here)", "ours", "after"]
    assert done.stderr == "warning: no verdict from http://judge\n"
    lines = ["noise of Python", "ours", "noise of C++", "noise of a child", "a warning"]
    lines += ["no verdict from http://judge", "noise of Megatron"]
    assert log.read_text().splitlines() == lines
    run(code, log)
    assert log.read_text().splitlines() == 2 * lines  # the next start goes on in the same file


def test_an_unexpected_error_shows_the_end_of_this_start_s_log_and_its_traceback(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    log.write_text("of an earlier start\n")
    done = run("with quiet(log):\n    for i in range(100): print('line', i)\n    1 / 0", log)
    assert done.returncode == 1
    assert f"the last lines of {log}" in done.stderr
    assert "line 99\n" in done.stderr
    assert "line 50\n" not in done.stderr
    assert "earlier" not in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_refusal_is_its_message_alone(tmp_path: Path) -> None:
    done = run("with quiet(log, announce=False):\n    print('noise'); sys.exit('--lr: is required')", tmp_path / "log")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "--lr: is required\n")


def test_a_crash_of_the_interpreter_leaves_a_traceback_on_the_screen(tmp_path: Path) -> None:
    done = run("import ctypes\nwith quiet(log):\n    ctypes.string_at(0)", tmp_path / "log")
    assert done.returncode < 0
    assert "Segmentation fault" in done.stderr
    assert "string_at" in done.stderr


def test_a_full_disk_costs_log_lines_not_the_run(tmp_path: Path) -> None:
    code = (
        "with quiet(Path('/dev/full')):\n    print('x' * 100_000, flush=True); say('ours'); print('y', file=sys.stderr)"
    )
    done = run(code, tmp_path / "log")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "ours"


def test_without_a_log_noise_leaves_no_file_and_no_line(tmp_path: Path) -> None:
    done = run("with quiet(None):\n    print('noise'); say('the answer')", tmp_path / "log")
    assert (done.stdout, done.stderr) == ("the answer\n", "")
    assert list(tmp_path.iterdir()) == []
