"""Runs one step ahead whose trainer, engine or teacher get a kill -9, and what must then be as in a run that nobody killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from training import last_step, learnt, output, screen, start, steps, wait_for_end_of_group, wait_until

from megatron_sip.experience.recording import groups_in
from megatron_sip.serving.launch import LocalServer, ServerSettings
from megatron_sip.serving.local_servers import ENGINE_FLAGS

STEPS, PROMPTS = 8, 4
AHEAD = (
    *("--max-staleness", "1", "--objective", "dpo", "--candidates", "suffix", "rollout", "--num-rollouts", "2"),
    *("--rollout-temperature", "0", "--criteria", "likelihood=1", "--ref-update-interval", "3"),
    *("--train-iters", str(STEPS), "--save-interval", "2", "--global-batch-size", str(PROMPTS)),
)
STEP_SECONDS = 0.6
"""About, so that a kill may come at any moment of a step."""
Victim = Literal["trainer", "engine", "teacher"]


@dataclass(frozen=True, slots=True)
class Kill:
    """Of whom, so many seconds after a step is in metrics.jsonl."""

    victim: Victim
    step: int
    seconds: float


def drawn_kills(seed: int, victims: Sequence[Victim]) -> list[Kill]:
    """One of each of `victims`, in any order, at random moments from the first step's end to the last but one's."""
    draw = random.Random(seed)
    moments = sorted((draw.randint(1, STEPS - 2), draw.uniform(0, STEP_SECONDS)) for _ in victims)
    return [Kill(victim, *moment) for victim, moment in zip(draw.sample(victims, len(victims)), moments, strict=True)]


def engine_settings(folder: Path) -> ServerSettings:
    """An engine of a small float32 model."""
    settings = ServerSettings(folder, dtype="float32", max_total_tokens=8192)
    return replace(settings, context_length=512, extra_args=ENGINE_FLAGS)


def run_killed(run: Path, flags: Sequence[str], kills: Sequence[Kill], servers: Mapping[Victim, LocalServer]) -> None:
    """A whole run; whoever is killed is started again, servers while the run goes on, and the trainer when they are back.

    Fails when it does not end as one that is done.
    """
    recording = ("--save-groups", str(groups_of(run)))
    process, shown = start(run, *flags, *recording), 0
    back: list[Future[LocalServer]] = []
    with ThreadPoolExecutor(len(servers)) as threads:
        for kill in kills:
            wait_until(partial(has_passed, run, kill.step, shown), run, process)
            time.sleep(kill.seconds)
            assert process.poll() is None, f"too late for {kill}:\n{output(run)[-6000:]}"
            if kill.victim == "trainer":
                process.kill()
                process.wait()
                wait_for_end_of_group(process.pid)
                for server in back:
                    server.result()
                process, shown = start(run, *flags, *recording), len(screen(run))
            else:
                back.append(threads.submit(killed(servers[kill.victim]).start))
        status = process.wait(300.0)
        assert status == 0, output(run)[-6000:]
        for server in back:
            server.result()


def has_passed(run: Path, step: int, shown: int) -> bool:
    """Whether a step is in metrics.jsonl and the present trainer has made one, its lines being those behind the `shown` first
    characters: one that starts refuses to while a server is down."""
    return last_step(run) >= step and "\nstep " in f"\n{screen(run)[shown:]}"


def killed(server: LocalServer) -> LocalServer:
    """kill -9 of a server and all its processes; it is to be started again at its address."""
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)
    server.stop()
    return server


def groups_of(run: Path) -> Path:
    """Where a run's groups are recorded."""
    return run.with_name(f"{run.name}_groups")


def recorded(run: Path) -> list[list[Any]]:
    """By step, of each group its task, and of each rollout its tokens and the weights that it is of."""
    found = []
    for step in range(STEPS):
        groups = groups_in(groups_of(run) / f"step_{step:07d}.replica_0.jsonl.zst")
        found.append([(g.task.index, [(c.ids, c.weight_version) for c in g.candidates]) for g in groups])
    return found


def require_each_task_once_a_step_ahead(run: Path) -> None:
    """Fails unless the run trained once on each task, in order, and on rollouts by the weights before the last update."""
    groups = recorded(run)
    assert [[task for task, _ in step] for step in groups] == [
        list(range(first, first + PROMPTS)) for first in range(0, STEPS * PROMPTS, PROMPTS)
    ]
    versions = [{version for _, made in step for _, version in made if version is not None} for step in groups]
    assert versions == [{"0"}, *({str(step)} for step in range(STEPS - 1))]
    assert [record["step"] for record in steps(run)] == list(range(1, STEPS + 1))
    assert [record["staleness"] for record in steps(run)] == [0, *[1] * (STEPS - 1)]


def require_equal(run: Path, other: Path) -> None:
    """Fails unless both runs trained on the same rollouts, to the same numbers.

    Engines batch prompts as they arrive, which moves float32 log-probs in the last digits.
    """
    assert recorded(run) == recorded(other)
    for found, expected in zip(learnt(steps(run)), learnt(steps(other)), strict=True):
        assert all(abs(a - b) <= max(1e-4 * abs(b), 1e-5) for a, b in zip(found, expected, strict=True)), (
            found,
            expected,
        )
