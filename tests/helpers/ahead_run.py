"""A run for the loop of train.py whose leader makes experience in a thread, as the real one does, and what outlives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from fake_run import FakeExchange, FakeRun

from megatron_sip.experience.maker import Experience
from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import Branch, Example, Task
from megatron_sip.run import Run, RunState, open_ahead
from megatron_sip.stop_signal import StopSignal

STEPS, PROMPTS = 7, 4
Trained = list[tuple[int, int]]
"""Of a step: task and weight version of each example."""


class KilledError(BaseException):
    """kill -9, but for what threads still do."""


@dataclass
class Disk:
    """What outlives a run: its last checkpoint, what each step trained on, and how many events come before a kill."""

    checkpoint: tuple[int, int, bytes | None] = (0, 0, None)
    trained: dict[int, Trained] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    left: int | None = None

    def event(self, name: str) -> None:
        """Something that takes time; the run may be killed before."""
        self.events.append(name)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise KilledError


@dataclass
class AheadLeader:
    """Makes two rollouts a step and task, of which `usable` says whether they teach anything, in `seconds`."""

    run: AheadRun
    usable: Callable[[int], bool] = lambda task: True
    seconds: Callable[[int], float] = lambda step: 0.001
    changes: Callable[[Experience], Experience | None] = lambda made: made
    engines: Any = None

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def begin_experience(
        self, step: int, version: str, tasks: Sequence[Task], next_tasks: Any, stop: StopSignal, round_index: int = 0
    ) -> Future[Experience | None]:
        self.run.disk.event(f"begin {step}")
        return self._thread.submit(self._make, step, version, list(tasks))

    def wait(self, under_way: Future[Experience | None]) -> Experience | None:
        return under_way.result(20.0)

    def _make(self, step: int, version: str, tasks: list[Task]) -> Experience | None:
        assert version == self.run.engine  # else the engines would refuse
        time.sleep(self.seconds(step))
        assert version == self.run.engine, "the engines got other weights while rollouts were under way"
        examples = [made_example(task.index, int(version)) for task in tasks if self.usable(task.index)]
        metrics: Metrics = {
            "groups": float(len(tasks)),
            "staleness": Mean(step - float(version)),
            "seconds/rollout": 1.0,
            "dropped/no spread": float(len(tasks) - len(examples)),
        }
        return self.changes(Experience(examples, metrics))


def made_example(task: int, version: int) -> Example:
    """One that says of which task and weights it is."""
    logprobs = [-0.1 * version, -1 / 3]
    rollout = Branch([version, 3], "rejected", "rollout", engine_logprobs=logprobs)
    return Example(task, [task], [Branch([2], "chosen", "suffix"), rollout])


class AheadRun(FakeRun):
    """Continues at the checkpoint of `disk`. engine: the version that the engines have. `logged` are the steps' metrics."""

    make_experience = Run.make_experience

    def __init__(self, disk: Disk, staleness: int = 1, exchange: Any = None, save_interval: int = 2) -> None:
        super().__init__([True] * STEPS, save_interval=save_interval)
        run = replace(self.settings.run, prompts=PROMPTS, oversample=2, max_staleness=staleness)
        self.settings = replace(self.settings, run=run)
        iteration, cursor, ahead = disk.checkpoint
        self.state = RunState(iteration, cursor, iteration or None)
        self.served, self.engine = iteration, str(iteration)
        self.ahead = open_ahead(self.settings, ahead)
        self.exchange = exchange or FakeExchange()
        self.disk = disk
        self.logged: list[Metrics] = []
        self.leader: Any = AheadLeader(self)
        self.tasks: Any = SimpleNamespace(
            tasks=lambda first, count: [Task(i, [1], [2], "p", "s") for i in range(first, first + count)],
            take_counts=lambda: {"tasks/seen": 1.0},
        )

    def train_step(self, examples: Sequence[Example], reference: None, iteration: int) -> Metrics:
        self.disk.event(f"train {iteration}")
        self.disk.trained[iteration] = [(e.task_index, e.branches[1].ids[0]) for e in examples]
        return {}

    def push_weights(self, *, require_all: bool = False) -> Metrics:
        self.disk.event(f"push {self.state.iteration}")
        self.served, self.engine = self.state.iteration, str(self.state.iteration)
        return {}

    def write_metrics(self, metrics: Metrics, *, validation: bool = False) -> None:
        self.logged.append(metrics)

    def save(self) -> None:
        super().save()
        kept = self.packed_ahead()
        self.disk.event(f"save {self.state.iteration}")
        self.disk.checkpoint = (self.state.iteration, self.state.consumed_samples, kept)
