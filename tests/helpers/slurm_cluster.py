"""A real SLURM of four nodes, all of them this host: its own munged, slurmctld and slurmds, by any user, without systemd.

Debian's packages `slurm-wlm` and `munge` are needed. Nodes are called by addresses of the loopback network, drawn by this
process's number, so that two of them on a host do not meet; GPUs are made up.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ports import kept_port

NODES = 4
GPUS = 8
REPO = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
FirstJobId={first_job}
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
KillWait=10
MinJobAge=3600
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr={name} Port={port} CPUs=64 RealMemory=64000 Gres=gpu:{gpus}"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a job: its number, its node and its command line."""

    pid: int
    node: str
    command: str


class SlurmCluster:
    """A context manager: while entered, jobs can be submitted from the repository's root."""

    def __init__(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        assert not missing, f"no {', '.join(missing)}: apt-get install slurm-wlm munge (CONTRIBUTING.md)"
        own = os.getpid()
        self.nodes = [f"127.{1 + own % 250}.{own // 250 % 250}.{number}" for number in range(11, 11 + NODES)]
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
        self._daemons: list[subprocess.Popen[bytes]] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = kept | {"SLURM_CONF": str(self._folder / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> Self:
        self._write_config()
        folder = self._folder
        munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        files = [f"--{name}={folder / file}" for name, file in {**munge, "seed-file": "munge.seed"}.items()]
        self._start("munged", "--foreground", "--force", *files)
        self._wait_until((folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "--states=idle", "--format=%D")
        self._wait_until(lambda: self.call(*idle, check=False).strip() == str(NODES))
        return self

    def __exit__(self, *_: object) -> None:
        self.call("scancel", f"--user={getpass.getuser()}", check=False)
        try:
            self._wait_until(lambda: not self.call("squeue", "--noheader", check=False))
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                daemon.wait()
            shutil.rmtree(self._folder)

    def call(self, *words: str, check: bool = True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            words, env=self.environment, cwd=REPO, capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, output: Path, *words: str, options: Iterable[str] = ()) -> str:
        """Submit examples/SCRIPT with `words`, and `options` for sbatch; the job's id."""
        # Nodes are shared with other jobs, of which a node has to serve several here.
        shared = ("--parsable", "--exclusive=user", "--mem=100", "--gpus-per-node=1", f"--output={output}")
        return self.call("sbatch", *shared, *options, f"examples/{script}", *words).strip()

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job)))

    def wait(self, job: str, timeout: float = 300.0) -> str:
        """The state in which a job ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self._wait_until(lambda: self.show(job)["JobState"] in ended, timeout)
        return self.show(job)["JobState"]

    def processes(self, job: str, words: str = "", node: str = "") -> list[Process]:
        """The living processes of a job, on any node, by what SLURM gave them to inherit; `words` are in the command line."""
        marks = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((path / "environ").read_bytes().split(b"\0"))
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended, or is another's
                continue
            if marks <= environment and words in command:
                [name] = [v[16:].decode() for v in environment if v.startswith(b"SLURMD_NODENAME=")] or [""]
                if name.startswith(node):
                    found.append(Process(int(path.name), name, command))
        return found

    def _write_config(self) -> None:
        folder = self._folder
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        folder.chmod(0o755)
        nodes = "\n".join(NODE.format(name=name, port=kept_port(), gpus=GPUS) for name in self.nodes)
        first_job = 1 + os.getpid() % 1_000_000
        values = {"port": kept_port(), "user": getpass.getuser(), "folder": folder, "nodes": nodes}
        (folder / "slurm.conf").write_text(CONFIG.format(first_job=first_job, **values))
        for number in range(GPUS):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")

    def _start(self, *command: str) -> None:
        guarded = [sys.executable, "-m", "megatron_sip.serving.guard", str(os.getpid()), *command]
        with (self._folder / f"{command[0]}.out").open("ab") as shown:
            self._daemons.append(
                subprocess.Popen(
                    guarded,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=shown,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _wait_until(self, reached: Callable[[], bool], timeout: float = 180.0) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            assert time.monotonic() < deadline, f"not within {timeout:g} s; SLURM says: {self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1000:] for path in self._folder.glob("*.[lo]*[gt]"))


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"  # where daemons are
