"""A run whose judge takes requests and answers none: the trainer says what it waits for and ends, and goes on where it was."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_judge import FakeJudge
from training import last_step, output, screen, start, steps, train, wait_until

from megatron_sip.serving.launch import LocalServer
from megatron_sip.serving.loop_thread import LoopThread
from megatron_sip.step_watch import STATUS


@pytest.fixture
def hangs() -> threading.Event:
    """While it is set the judge answers nothing."""
    return threading.Event()


@pytest.fixture
def judge(hangs: threading.Event) -> Iterator[FakeJudge]:
    def verdict(prompt: str) -> str:
        return f"FINAL DECISION: {'YES' if zlib.crc32(prompt.encode()) % 2 else 'NO'}"

    loop, judge = LoopThread("judge"), FakeJudge(lambda index: "hang" if hangs.is_set() else None, verdict)
    loop.run(judge.start())
    yield judge
    loop.run(judge.stop())
    loop.close()


def test_a_step_that_hangs_ends_the_trainer_which_then_goes_on_at_its_checkpoint(
    judge: FakeJudge,
    hangs: threading.Event,
    corpus: Path,
    tiny_llama_dir: Path,
    tiny_engine: LocalServer,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    flags = (
        *("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus), "--train-iters", "4", "--save-interval", "1"),
        *("--objective", "dpo", "--candidates", "suffix", "rollout", "--num-rollouts", "4"),
        *("--criteria", "safety=1", "--judge-verdict", "hard", "--judge-votes", "1", "--rollout-url", tiny_engine.url),
        *("--teacher-url", judge.url, "--teacher-api", "openai", "--teacher-name", "fake", "--step-timeout", "20"),
    )
    process = start(run, *flags)
    wait_until(lambda: last_step(run) >= 2, run, process)
    hangs.set()
    assert process.wait(120) == STATUS, output(run)[-6000:]
    hung = last_step(run) + 1
    assert (
        f"error: step {hung} did not end within --step-timeout 20 s: rank 0 was still at making experience"
        in screen(run)
    )
    assert f"{run}/logs" in screen(run)
    assert "in make_experience" in (run / "logs" / "output.log").read_text()
    hangs.clear()
    train(run, *flags)
    assert [record["step"] for record in steps(run)] == [1, 2, 3, 4]
