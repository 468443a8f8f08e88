"""The sbatch files on a real SLURM with real Megatron under torchrun, and real SGLang on other nodes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from slurm_cluster import Process, SlurmCluster
from training import COMMON, steps
from workers import run_program

from megatron_sip.serving.launch import CPU_FLAGS

pytestmark = [pytest.mark.slow, pytest.mark.server]

STEPS = 8
SERVER = (
    *CPU_FLAGS,
    *("--dtype=float32", "--mem-fraction-static=0.5", "--max-total-tokens=8192", "--skip-server-warmup"),
)


def environment(folder: Path) -> Path:
    """A folder for VENV: this environment's programs, but for SGLang's server, which is the one for machines without a GPU."""
    here, server = Path(sys.executable).parent, "megatron_sip.platform.sglang_server_cpu"
    (folder / "bin").mkdir(parents=True)
    for name, command in {
        "python": f'[ "$2" = sglang.launch_server ] || exec {here}/python "$@"\n'
        f'shift 2; exec env -u OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE {here}/python -m {server} "$@"',
        "torchrun": f'exec env OMP_NUM_THREADS=1 {here}/torchrun "$@"',
    }.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def variables(pid: int) -> list[bytes]:
    """NAME=VALUE of a process."""
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def rank_among(found: Sequence[Process]) -> int:
    """The process that torchrun started, without helpers that it has forked."""
    ranks = {process.pid for process in found if b"LOCAL_RANK=0" in variables(process.pid)}
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}
    [rank] = [pid for pid, parent in parents.items() if parent not in ranks]
    return rank


class Job:
    """A job whose models are tiny, one engine and one teacher, which is asked for likelihoods and rewrites."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, script: str, steps: int, trainers: int, settings: dict[str, object]
    ) -> None:
        self.cluster, self.run, self.output = cluster, folder / "run", folder / "job.out"
        own = {
            **{"VENV": environment(folder / "venv"), "RUN_DIR": self.run, "SEQ_LENGTH": 96, "WIN_RATE_PROMPTS": 0},
            **{"GPUS_PER_NODE": 1, "TRAINER_NODES": trainers, "ENGINE_NODES": 1, "TEACHER_NODES": 1},
            **{"ENGINE_FLAGS": " ".join(SERVER), "TEACHER_FLAGS": " ".join((*SERVER, "--context-length=2048"))},
        }
        flags = (*COMMON, "--criteria", "likelihood=1", "--train-iters", str(steps), "--save-interval", "1")
        flags += ("--save-retain-interval", "100", "--lr-warmup-iters", "0", "--rollout-temperature", "0")
        words = [*(f"{name}={value}" for name, value in (own | settings).items()), "--", *flags]
        self.id = cluster.submit(script, self.output, *words, options=(f"--nodes={trainers + 2}",))
        self._deadline = time.monotonic() + 900

    def told(self) -> str:
        """All that it says."""
        logs = "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in (self.run / "logs").glob("*"))
        return f"{self.cluster.show(self.id)['JobState']}\n{self.output.read_text()}\n{logs}"

    def wait_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            assert time.monotonic() < self._deadline, self.told()
            assert self.cluster.show(self.id)["JobState"] in ("PENDING", "RUNNING"), self.told()
            time.sleep(0.2)

    def completes(self, last: int) -> None:
        """It ends well, with each step once and an engine that has the weights of each, and leaves no process."""
        assert self.cluster.wait(self.id, 900) == "COMPLETED", self.told()
        deadline = time.monotonic() + 30
        while left := self.cluster.processes(self.id):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert [step["step"] for step in steps(self.run)] == list(range(1, last + 1))
        assert {step["engines/unsynced"] for step in steps(self.run)} == {0}
        assert all(step["grad_norm"] > 0 for step in steps(self.run))


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as made:
        yield made


def test_a_job_trains_a_model_on_four_nodes_and_a_killed_rank_costs_no_step(
    cluster: SlurmCluster, corpus: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy"
    converted = run_program(
        *("-m", "megatron_sip.hf.convert", "hf-to-megatron", "--load", str(tiny_llama_dir), "--save", str(policy))
    )
    assert converted.returncode == 0, converted.stdout
    settings = {"POLICY": policy, "TEACHER_MODEL": tiny_llama_dir, "DATA": corpus, "PRESET": "safety-suffix-2"}
    job = Job(cluster, tmp_path, "train_continual.sbatch", STEPS, 2, settings)
    job.wait_until(lambda: bool(steps(job.run)))
    rank = rank_among(cluster.processes(job.id, "megatron_sip.train", cluster.nodes[1]))
    [key] = [value[21:] for value in variables(rank) if value.startswith(b"MEGATRON_SIP_JOB_KEY=")]
    commands = [process.command.encode() for process in cluster.processes(job.id)]
    servers = {process.pid for process in cluster.processes(job.id, "megatron_sip.platform")}
    os.kill(rank, signal.SIGKILL)
    job.wait_until(lambda: "and is started again" in job.output.read_text() and len(steps(job.run)) >= STEPS - 1)
    assert servers >= {process.pid for process in cluster.processes(job.id, "megatron_sip.platform")}
    job.completes(STEPS)
    written = [path.read_bytes() for path in (job.output, *job.run.rglob("*")) if path.is_file()]
    assert not [text for text in (*commands, *written) if key in text]


def test_a_job_trains_a_model_from_scratch_on_rewrites_and_rollouts(
    cluster: SlurmCluster, corpus: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings: dict[str, object] = {"HF_CONFIG": tiny_llama_dir, "TEACHER_MODEL": tiny_llama_dir, "DATA": corpus}
    job = Job(cluster, tmp_path, "train_from_scratch.sbatch", 2, 1, settings)
    job.completes(2)
    assert all(step["rewriter/calls"] > 0 for step in steps(job.run))
