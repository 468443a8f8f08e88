"""Ctrl-C: the first asks for a save, the second ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from megatron_sip.stop_signal import StopSignal
with StopSignal() as stop:
    print("runs", flush=True)
    while not stop.requested:
        time.sleep(0.005)
    print("requested", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
"""


def start(seconds_of_saving: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(seconds_of_saving)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "runs\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_lets_the_run_save_and_exit_0(number: signal.Signals) -> None:
    process = start(0.0)
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "requested\nsaved\n")
    assert ("Ctrl-C again ends it at once" in errors) == (number == signal.SIGINT)


def test_the_second_ctrl_c_ends_the_process_at_once() -> None:
    process = start(60.0)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "requested\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (-signal.SIGINT, "")
