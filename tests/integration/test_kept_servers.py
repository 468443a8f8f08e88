"""A run whose own servers are killed: they are started again, get the policy's weights, and the run ends as any other."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from training import last_step, output, screen, start, steps, wait_for_end_of_group, wait_until

STEPS = 12


def server_groups(folder: Path, flag: str) -> list[int]:
    """Process groups of the servers that serve `folder` and whose command lines hold `flag`."""
    groups = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if f"--model-path={folder}".encode() in words and flag.encode() in words:
                groups.add(os.getpgid(int(entry.name)))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(groups)


@pytest.mark.server
def test_a_killed_engine_and_a_killed_teacher_are_back_and_every_step_is_made(
    corpus: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)  # or servers that other tests share would be taken for the run's own
    flags = (
        *("--hf-config", str(model), "--data-path", str(corpus), "--train-iters", str(STEPS)),
        *("--objective", "dpo", "--candidates", "suffix", "rollout", "--num-rollouts", "2", "--save-interval", "4"),
        *("--criteria", "likelihood=1", "--rollout-local", "1", "--teacher-model", str(model)),
    )
    process = start(run, *flags)
    try:
        wait_until(lambda: last_step(run) >= 2, run, process)
        [engine] = server_groups(model, "--load-format=dummy")
        [teacher] = set(server_groups(model, "--skip-server-warmup")) - {engine}
        os.killpg(teacher, signal.SIGKILL)
        reached = last_step(run)
        wait_until(lambda: "the teacher is back" in screen(run), run, process)
        wait_until(lambda: last_step(run) > reached + 1, run, process)
        [engine] = server_groups(model, "--load-format=dummy")
        os.killpg(engine, signal.SIGKILL)
        assert process.wait(300) == 0, output(run)[-6000:]
    finally:
        process.kill()
    wait_for_end_of_group(process.pid)
    assert "the engine is back" in screen(run)
    made = steps(run)
    assert [record["step"] for record in made] == list(range(1, STEPS + 1))
    # What the engine had in hand is lost and counted; nothing that it sampled before it had its weights is used.
    assert sum("loss" in record for record in made) >= STEPS - 2
    deadline = time.monotonic() + 30
    while server_groups(model, "--skip-server-warmup"):
        assert time.monotonic() < deadline, "a server outlives its run"
        time.sleep(0.1)
