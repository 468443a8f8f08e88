"""The sbatch files on a real SLURM of four nodes, with programs that need no model: what docs/slurm.md says of a job's life."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_programs
from slurm_cluster import Process, SlurmCluster

pytestmark = pytest.mark.slow

STEPS = 8
CONTINUAL, FROM_SCRATCH = "train_continual.sbatch", "train_from_scratch.sbatch"
ENGINE, TEACHER, TRAINER = "--load-format=dummy", "--model-path=judge", "megatron_sip.train"
"""What is in the command line of one process of each role, and of no other."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as made:
        yield made


class Job:
    """A submitted job with two trainer nodes, an engine's and a teacher's."""

    def __init__(
        self,
        cluster: SlurmCluster,
        folder: Path,
        script: str,
        *settings: str,
        flags: tuple[str, ...] = (),
        options: tuple[str, ...] = (),
    ) -> None:
        self.run, self.cluster, self._output = folder / "run", cluster, folder / "job.out"
        own = {"VENV": slurm_programs.make_environment(folder / "venv"), "TEACHER_MODEL": "judge", "DATA": "README.md"}
        own |= {"RUN_DIR": self.run, "HF_CONFIG" if script == FROM_SCRATCH else "POLICY": "policy"}
        own |= {"TRAINER_NODES": 2, "ENGINE_NODES": 1, "TEACHER_NODES": 1, "GPUS_PER_NODE": 1, "RESTART_SECONDS": 0}
        words = [
            *(f"{name}={value}" for name, value in own.items()),
            *settings,
            "--",
            "--train-iters",
            str(STEPS),
            *flags,
        ]
        self.id = cluster.submit(script, self._output, *words, options=("--nodes=4", *options))

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def steps(self) -> list[int]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def programs(self, role: str, node: str = "") -> list[Process]:
        """The processes of a role, without the srun and shells that start them."""
        return [
            found
            for found in self.cluster.processes(self.id, role, node)
            if found.command.split()[2:3] == [slurm_programs.__file__]
        ]

    def key(self) -> str:
        """What its servers demand, from a trainer's environment."""
        environment = Path(f"/proc/{self.programs(TRAINER)[0].pid}/environ").read_text().split("\0")
        return next(value.partition("=")[2] for value in environment if value.startswith("MEGATRON_SIP_JOB_KEY="))

    def is_held(self) -> None:
        """Once its trainer waits in the middle."""
        self.wait_until(lambda: len(self.steps()) == slurm_programs.HELD_AT)

    def go(self) -> None:
        """Its trainer goes on, or need not wait."""
        self.run.mkdir(exist_ok=True)
        (self.run / "go").touch()

    def wait_until(self, reached: Callable[[], bool], timeout: float = 180.0) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            assert time.monotonic() < deadline, f"not within {timeout:g} s:\n{self.output}\n{self.logs()}"
            time.sleep(0.05)

    def ends(self, state: str = "COMPLETED") -> None:
        """Once it has ended: in `state`, without any process left."""
        assert self.cluster.wait(self.id) == state, f"{self.output}\n{self.logs()}"
        self.wait_until(lambda: not self.cluster.processes(self.id), 30)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1000:]}" for path in (self.run / "logs").glob("*"))

    def finishes(self) -> None:
        """It completes, with each step once."""
        self.ends()
        assert self.steps() == list(range(1, STEPS + 1))
        assert (self.run / "summary.json").exists()


def only(found: list[Process]) -> Process:
    [process] = found
    return process


def test_two_jobs_on_the_same_hosts_complete_with_servers_of_their_own(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A server refuses who has another key than its job's, and a trainer that is refused fails. Nothing shows a key."""
    jobs = [Job(cluster, tmp_path / script, script) for script in (CONTINUAL, FROM_SCRATCH)]
    for job in jobs:
        job.is_held()
    assert len({cluster.show(job.id)["NodeList"] for job in jobs}) == 1
    keys = [job.key().encode() for job in jobs]
    assert len(set(keys)) == 2
    commands = [process.command.encode() for job in jobs for process in cluster.processes(job.id)]
    for job in jobs:
        job.go()
        job.finishes()
        assert "again" not in job.output
        assert "requeue" not in job.output
    shown = [*commands, *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert not [text for text in shown if any(key in text for key in keys)]


def test_a_killed_rank_costs_no_step_and_the_servers_stay(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, CONTINUAL)
    job.is_held()
    servers = {process.pid for role in (ENGINE, TEACHER) for process in job.programs(role)}
    os.kill(only(job.programs(TRAINER, cluster.nodes[1])).pid, signal.SIGKILL)
    job.wait_until(lambda: "is started again" in job.output)
    job.wait_until(lambda: len(job.programs(TRAINER)) == 2)
    assert servers == {process.pid for role in (ENGINE, TEACHER) for process in job.programs(role)}
    job.go()
    job.finishes()
    assert cluster.show(job.id)["Restarts"] == "0"


def test_a_trainer_that_comes_no_further_is_requeued_and_given_up(cluster: SlurmCluster, tmp_path: Path) -> None:
    """It saves step 2 and dies in step 4: it is started again, gets no further, and so after a requeue."""
    job = Job(cluster, tmp_path, CONTINUAL, "MAX_RESTARTS=1", flags=("--dies-at", "4"))
    job.go()
    job.ends("FAILED")
    assert job.steps() == [1, 2, 3]
    assert job.output.count("after step 3 and is started again") == 2
    assert len(re.findall(r"^failed with status \d+; requeueing", job.output, re.MULTILINE)) == 1
    assert "not requeued any more, after 1 times at checkpoint 2" in job.output


@pytest.mark.parametrize(
    ("role", "number", "why"),
    [
        (ENGINE, signal.SIGKILL, "ended with status 137"),
        (TEACHER, signal.SIGKILL, "ended with status 137"),
        (TEACHER, signal.SIGSTOP, r"has answered nothing for \d+ s"),
    ],
    ids=["killed-engine", "killed-teacher", "hung-teacher"],
)
def test_a_lost_server_is_replaced_while_the_trainer_waits(
    cluster: SlurmCluster, tmp_path: Path, role: str, number: signal.Signals, why: str
) -> None:
    job = Job(cluster, tmp_path, CONTINUAL, "HANG_SECONDS=8")
    job.is_held()
    trainers = {process.pid for process in job.programs(TRAINER)}
    log = job.run / "logs" / f"teacher-{cluster.nodes[3]}-0.log"
    job.wait_until(
        lambda: log.read_text().count("asked") >= 2
    )  # so the first answer is known: what loads is given time
    lost = only(job.programs(role)).pid
    os.kill(lost, number)
    job.wait_until(lambda: lost not in {process.pid for process in job.programs(role)})
    assert trainers == {process.pid for process in job.programs(TRAINER)}
    job.go()
    job.finishes()
    assert re.search(rf"servers: (engine|teacher)-\S+ at \S+ {why} and is started again", job.output)


def test_a_job_that_an_operator_requeues_continues(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, CONTINUAL)
    job.is_held()
    cluster.call("scontrol", "requeue", job.id)
    job.wait_until(lambda: cluster.show(job.id)["Restarts"] == "1")
    job.go()
    job.finishes()
    assert cluster.show(job.id)["Restarts"] == "1"


def test_before_its_time_limit_a_job_saves_and_requeues_itself(cluster: SlurmCluster, tmp_path: Path) -> None:
    """SLURM looks for such jobs every half a minute: the warning comes up to so much earlier, 15 to 45 s in."""
    limit = ("--time=2", "--signal=B:TERM@75")
    job = Job(cluster, tmp_path, CONTINUAL, "SAVE_SECONDS=20", options=limit)
    job.is_held()
    job.wait_until(lambda: "stopped before the end; requeueing" in job.output)
    job.go()
    job.finishes()
    assert int(cluster.show(job.id)["Restarts"]) >= 1


def test_a_cancelled_job_stays_ended(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, CONTINUAL)
    job.is_held()
    cluster.call("scancel", job.id)
    job.ends("CANCELLED")
    assert "requeue" not in job.output
    assert job.steps() == list(range(1, int((job.run / "latest_checkpointed_iteration.txt").read_text()) + 1))
