"""A run whose judge answers nothing any more: the trainer says what it waits for and ends, and goes on where it was."""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_judge import FakeJudge
from training import last_step, output, screen, start, steps, tracked, train, wait_until

from megatron_sip.serving.loop_thread import LoopThread
from megatron_sip.step_watch import STATUS


@pytest.fixture
def hangs() -> threading.Event:
    """While it is set the judge answers nothing."""
    return threading.Event()


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("judge")
    yield loop
    loop.close()


@pytest.fixture
def judge(loop: LoopThread, hangs: threading.Event) -> Iterator[FakeJudge]:
    def answer(prompt: str) -> str:
        if "FINAL DECISION" in prompt:
            return f"FINAL DECISION: {'YES' if zlib.crc32(prompt.encode()) % 2 else 'NO'}"
        text = re.findall(r"\n\[begin [a-z ]+ [0-9a-f]{8}\]\n(.*?)\n\[end", prompt, re.DOTALL)[-1]
        return text[: 2 * len(text) // 3]

    judge = FakeJudge(lambda index: "hang" if hangs.is_set() else None, answer)
    loop.run(judge.start())
    yield judge
    loop.run(judge.stop())


@pytest.fixture
def flags(judge: FakeJudge, corpus: Path, tiny_llama_dir: Path) -> tuple[str, ...]:
    """A run without engines, so that nothing but the judge is waited for."""
    return (
        *("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus), "--train-iters", "4", "--save-interval", "1"),
        *("--objective", "dpo", "--candidates", "suffix", "rewrite", "--win-rate-prompts", "0"),
        *("--criteria", "safety=1", "--judge-verdict", "hard", "--judge-votes", "1"),
        *("--teacher-url", judge.url, "--teacher-api", "openai", "--teacher-name", "fake"),
    )


def test_a_step_that_hangs_ends_the_trainer_which_then_goes_on_at_its_checkpoint(
    hangs: threading.Event, flags: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(run, *flags, "--step-timeout", "20")
    wait_until(lambda: last_step(run) >= 1, run, process)
    hangs.set()
    assert process.wait(120) == STATUS, output(run)[-6000:]
    hung = last_step(run) + 1
    told = f"error: step {hung} did not end within --step-timeout 20 s: rank 0 was still at making experience"
    assert told in screen(run)
    assert f"{run}/logs" in screen(run)
    assert "in make_experience" in (run / "logs" / "output.log").read_text()
    hangs.clear()
    train(run, *flags)
    assert [record["step"] for record in steps(run)] == [1, 2, 3, 4]


def test_a_judge_that_is_gone_ends_the_run_with_the_step_before_saved_and_the_same_command_makes_that_step_again(
    judge: FakeJudge, loop: LoopThread, flags: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(run, *flags, "--judge-deadline", "3")
    wait_until(lambda: last_step(run) >= 1, run, process)
    loop.run(judge.stop())
    assert process.wait(120) == 1, output(run)[-6000:]
    made = last_step(run)
    assert tracked(run) == made
    assert f"the teacher at {judge.url} answers no more. Step {made} is saved, the same command continues" in screen(
        run
    )
    again = start(run, *flags)
    wait_until(lambda: f"waiting for the teacher at {judge.url}" in screen(run), run, again)  # as a requeued job does
    loop.run(judge.start())
    assert again.wait(120) == 0, output(run)[-6000:]
    assert [record["step"] for record in steps(run)] == [1, 2, 3, 4]
