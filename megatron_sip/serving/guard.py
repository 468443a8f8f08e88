"""Run a command that must not outlive its parent, not even one that is killed with SIGKILL.

    python -m megatron_sip.serving.guard PARENT_PID command [argument ...]

The guard leads a process group with the command and all its descendants in it. When the parent goes away, it ends
that whole group. A pidfd tells it so at once; PR_SET_PDEATHSIG would not do, because it also fires when merely the
*thread* that started the server ends. Should the guard itself be killed, the kernel kills the command (that is
what PR_SET_PDEATHSIG is good for here: the guard has one thread). Linux only, standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

from megatron_sip.child_processes import kill_with_parent

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL for the command after its parent has gone."""


def own_environment() -> dict[str, str]:
    """This process's environment for one that is no rank of its job, without what torchrun and srun say of its place there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    for name in ("", "LOCAL_", "GROUP_", "ROLE_"):
        kept.pop(f"{name}RANK", None)
        kept.pop(f"{name}WORLD_SIZE", None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"):
        kept.pop(name, None)
    return kept


def _prepare_command() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    kill_with_parent()


def end(process: subprocess.Popen[bytes], process_group: int, grace_s: float) -> None:
    """SIGTERM `process`, wait until it has ended or `grace_s` seconds have passed, then SIGKILL the whole group.

    Only the leading process gets the SIGTERM: a server that sees its workers end first takes it for a crash.
    """
    if process.poll() is None:
        process.terminate()
    deadline = time.monotonic() + grace_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        os.killpg(process_group, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended


def run(parent_pid: int, command: list[str]) -> int:
    """Run `command`; return its exit status, as shells do 128 + the signal that ended it, or end it and return 1 when process
    `parent_pid` has gone."""
    parent = os.pidfd_open(parent_pid)
    if os.getppid() != parent_pid:  # it died before we looked, and the pid may already be another process
        return 1
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    process = subprocess.Popen(command, preexec_fn=_prepare_command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    child = os.pidfd_open(process.pid)
    poller = select.poll()
    poller.register(parent, select.POLLIN)
    poller.register(child, select.POLLIN)
    ready = {fd for fd, _ in poller.poll()}
    if child in ready:
        status = process.wait()
        return status if status >= 0 else 128 - status
    end(process, os.getpgrp(), GRACE_S)  # its SIGKILL ends this guard as well
    return 1


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdigit():
        sys.exit("usage: python -m megatron_sip.serving.guard PARENT_PID command [argument ...]")
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
