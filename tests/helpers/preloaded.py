"""Starts programs as `python -m MODULE` and `python SCRIPT` do, but without waiting for their imports.

Torch, Megatron and transformers are most of a short run's time. One process imports them, at the first start of a test
session; each start is a fork of it that gets its own arguments, environment, folder, output, session and rank, runs the
program as `__main__` and ends as Python does. What is set up at import, in an environment of its own, needs a real start.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ports import kept_port

from megatron_sip.serving.launch import HOST

IMPORTED = (
    *("megatron_sip.run", "megatron_sip.config.parse", "megatron_sip.config.settings"),
    *("megatron_sip.evaluation.outcome", "megatron_sip.hf.standalone", "transformers.utils.type_validators"),
    *("megatron.training.training", "megatron.training.initialize"),
)
"""No program itself, which must be run and not be there already."""
NOT_PROGRAM_S = {
    *("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"),
    *("HF_XET_HIGH_PERFORMANCE", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),
}
"""Of the environment: what pytest, torch in a test that compiles, lm-eval and scikit-learn set for themselves."""
NUMBER = struct.Struct("i")
MESSAGE_BYTES = 1 << 16


class Started:
    """A program that runs: what tests need of `subprocess.Popen`. Of several ranks the pid is the first's."""

    def __init__(self, report: int) -> None:
        self.returncode: int | None = None
        self._report = report
        self.pid = self._number()

    def _number(self) -> int:
        return int(NUMBER.unpack(os.read(self._report, NUMBER.size))[0])

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, of several ranks the first that is not 0; subprocess.TimeoutExpired as Popen."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = self._number()
            os.close(self._report)
        return self.returncode

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended; the other ranks are killed once the first has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(program: Sequence[str], output: IO[Any], processes: int = 1) -> Started | None:
    """Start `python PROGRAM...` in this folder and environment, with one OpenMP thread; None where only a real start does.

    That is where the environment is another than the imports had.
    """
    preloaded = _preloaded()
    if _environment() != preloaded.environment:
        return None
    return preloaded.start(program, output, processes)


@functools.cache
def _preloaded() -> _Preloaded:
    return _Preloaded()


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in NOT_PROGRAM_S}
    return kept | {"OMP_NUM_THREADS": "1"}


ENVIRONMENT = _environment()
"""The session's, before any test has one of its own."""


class _Preloaded:
    """The process with the imports, from this side. It ends with this one, which holds the other end of its socket."""

    def __init__(self) -> None:
        self.environment = ENVIRONMENT
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._shown = tempfile.TemporaryFile()  # noqa: SIM115 (it is open as long as the process)
        with theirs:
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._shown,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )

    def start(self, program: Sequence[str], output: IO[Any], processes: int) -> Started:
        ranks = _ranks(processes, kept_port()) if processes > 1 else [{}]
        report, theirs = os.pipe()
        request = {"program": list(program), "folder": str(Path.cwd()), "ranks": ranks}
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [output.fileno(), theirs])
            os.close(theirs)
            return Started(report)
        except (OSError, struct.error):
            self._shown.seek(0)
            raise RuntimeError(f"it has ended:\n{self._shown.read().decode(errors='replace')[-6000:]}") from None


def _ranks(processes: int, port: int) -> list[dict[str, str]]:
    """What torchrun tells each rank on one node, but that the first rank has the store."""
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": HOST, "MASTER_PORT": port}
    common = {name: str(value) for name, value in common.items()} | {"TORCHELASTIC_RUN_ID": "preloaded"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(processes)]


def main() -> None:
    """Import, then fork for each request, until there is nobody left to send one. Returns in a program's process too."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    _import_all()
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 2)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            request = json.loads(message)
            _be_rank(request["ranks"], *descriptors)
            _run(request["program"], request["folder"])
            return
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that waited for programs before
                pass


def _import_all() -> None:
    from megatron_sip.platform.megatron import prepare_megatron

    prepare_megatron()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a fork does not write to stays shared
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads at import: a fork would have only one of them"


def _be_rank(ranks: Sequence[Mapping[str, str]], output: int, report: int) -> None:
    """Returns in a new process for each rank, as it should begin; this one waits for them and reports how they ended."""
    pids = set()
    for own in ranks:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            if own is ranks[0]:
                os.write(report, NUMBER.pack(os.getpid()))
            os.close(report)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            os.environ.update(own)
            return
        pids.add(pid)
    status = 0
    while pids:
        pid, ended = os.wait()
        pids.remove(pid)
        if ended and not status:
            status = os.waitstatus_to_exitcode(ended)
            for other in pids:  # they would wait for it
                os.kill(other, signal.SIGKILL)
    os.write(report, NUMBER.pack(status))
    os._exit(0)


def _run(program: Sequence[str], folder: str) -> None:
    os.chdir(folder)
    module = program[0] == "-m"
    sys.argv = list(program[1:] if module else program)
    sys.path[0] = folder if module else str(Path(program[0]).parent)
    if module:
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
