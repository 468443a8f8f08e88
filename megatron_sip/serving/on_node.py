"""Run a program of a job on its node, with what `serving.node` gives it.

    python -m megatron_sip.serving.on_node --peers HOST ... -- command [argument ...]

Its exit status is the command's. Signals go on to the command. It is in a session of its own, so that it gets them
once where SLURM sends them to a task's process group (where SLURM looks for all of its processes it may get them twice).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from megatron_sip.child_processes import kill_with_parent
from megatron_sip.serving.node import node_variables, private_folder

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(command: Sequence[str], peers: Sequence[str]) -> int:
    """The command's exit status, as a shell gives it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    with private_folder() as folder:
        process = subprocess.Popen(
            command,
            env={**os.environ, **node_variables(folder, peers, os.environ)},
            preexec_fn=_prepare,
            start_new_session=True,
        )
        for number in FORWARDED:
            signal.signal(number, lambda received, _: process.send_signal(received))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        status = process.wait()
    return status if status >= 0 else 128 - status


def _prepare() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    kill_with_parent()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a program of a job on its node.")
    parser.add_argument("--peers", nargs="*", default=[], metavar="HOST", help="hosts that it talks to")
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args()
    return run(given.command, given.peers)


if __name__ == "__main__":
    sys.exit(main())
