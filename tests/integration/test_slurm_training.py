"""train_continual.sbatch on a real SLURM with real Megatron under torchrun on two nodes, and real SGLang on two others."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
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


def test_a_job_trains_a_model_on_four_nodes_and_a_killed_rank_costs_no_step(
    corpus: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    policy, run, output = tmp_path / "policy", tmp_path / "run", tmp_path / "job.out"
    converted = run_program(
        *("-m", "megatron_sip.hf.convert", "hf-to-megatron", "--load", str(tiny_llama_dir), "--save", str(policy))
    )
    assert converted.returncode == 0, converted.stdout
    settings = {
        **{"VENV": environment(tmp_path / "venv"), "POLICY": policy, "TEACHER_MODEL": tiny_llama_dir, "RUN_DIR": run},
        **{"DATA": corpus, "PRESET": "safety-suffix-2", "SEQ_LENGTH": 96, "WIN_RATE_PROMPTS": 0, "GPUS_PER_NODE": 1},
        **{"TRAINER_NODES": 2, "ENGINE_NODES": 1, "TEACHER_NODES": 1},
        **{"ENGINE_FLAGS": " ".join(SERVER), "TEACHER_FLAGS": " ".join(SERVER)},
    }
    flags = (*COMMON, "--criteria", "likelihood=1", "--train-iters", str(STEPS), "--save-interval", "1")
    flags += ("--save-retain-interval", "100", "--lr-warmup-iters", "0", "--rollout-temperature", "0")
    with SlurmCluster() as cluster:
        words = [*(f"{name}={value}" for name, value in settings.items()), "--", *flags]
        job = cluster.submit("train_continual.sbatch", output, *words, options=("--nodes=4",))
        deadline = time.monotonic() + 900

        def told() -> str:
            logs = "\n".join(f"{log.name}: {log.read_text()[-3000:]}" for log in (run / "logs").glob("*"))
            return f"{cluster.show(job)['JobState']}\n{output.read_text()}\n{logs}"

        while not steps(run):
            assert time.monotonic() < deadline, told()
            assert cluster.show(job)["JobState"] in ("PENDING", "RUNNING"), told()
            time.sleep(0.2)
        rank = rank_among(cluster.processes(job, "megatron_sip.train", cluster.nodes[1]))
        [key] = [value[21:] for value in variables(rank) if value.startswith(b"MEGATRON_SIP_JOB_KEY=")]
        commands = [process.command.encode() for process in cluster.processes(job)]
        servers = {process.pid for process in cluster.processes(job, "megatron_sip.platform")}
        os.kill(rank, signal.SIGKILL)
        while "and is started again" not in output.read_text() or len(steps(run)) < STEPS - 1:
            assert time.monotonic() < deadline, told()
            time.sleep(0.2)
        assert servers >= {process.pid for process in cluster.processes(job, "megatron_sip.platform")}
        assert cluster.wait(job, 900) == "COMPLETED", told()
        assert not cluster.processes(job)
    assert [step["step"] for step in steps(run)] == list(range(1, STEPS + 1))
    assert {step["engines/unsynced"] for step in steps(run)} == {0}
    assert all(step["grad_norm"] > 0 for step in steps(run))
    written = [path.read_bytes() for path in (output, *run.rglob("*")) if path.is_file()]
    assert not [text for text in (*commands, *written) if key in text]
