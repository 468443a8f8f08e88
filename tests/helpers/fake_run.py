"""A run for the loop of train.py, with its parts faked."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from flag_cases import unchecked_settings

from megatron_sip.experience.maker import Experience
from megatron_sip.metrics import Metrics
from megatron_sip.platform.megatron import prepare_megatron
from megatron_sip.records import Branch, Example
from megatron_sip.step_watch import StepWatch
from megatron_sip.stop_signal import StopSignal
from megatron_sip.training.non_finite import NON_FINITE

prepare_megatron()  # before anything imports Megatron

from megatron_sip.run import Run, RunState  # noqa: E402

EXAMPLE = Example(0, [1], [Branch([2], "chosen", "suffix"), Branch([3], "rejected", "rollout")])


class FakeExchange:
    """One process."""

    is_leader, replica, num_replicas = True, 0, 1

    def all_gather_from_leaders(self, mine: Any) -> list[Any]:
        return [mine]

    def all_gather(self, mine: Any) -> list[Any]:
        return [mine]

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass


class FakeRun(Run):
    """A run whose steps have an example, or none, as `usable` says, and of which those in `bad` give no finite gradient.

    `saved` are the iterations of its checkpoints.
    """

    def __init__(
        self,
        usable: Sequence[bool],
        save_interval: int,
        iteration: int = 0,
        bad: Sequence[int] = (),
        before: int = 0,
        rank: int = 0,
        empty: str | Sequence[str] = "no verdict",
    ) -> None:
        self.settings = unchecked_settings(
            train_iters=iteration + len(usable), global_batch_size=1, save_interval=save_interval, rank=rank
        )
        self.state = RunState(iteration, iteration, iteration or None, before)
        self.exchange: Any = FakeExchange()
        self.trainer: Any = SimpleNamespace(train_step=self.train_step)
        self.reference = self.writer = None
        self.saved: list[int] = []
        self.troubles: list[str] = []
        self.finished = False
        self.watch = StepWatch(0.0, "")
        self._usable = list(usable)
        self._bad = set(bad)
        self._reasons = [f"dropped/{reason}" for reason in ([empty] if isinstance(empty, str) else empty)]

    def train_step(self, examples: Sequence[Example], reference: None, iteration: int) -> Metrics:
        return {NON_FINITE: 1.0} if iteration + 1 in self._bad else {}

    def make_experience(self, stop: StopSignal, round_index: int = 0) -> Experience:
        usable = self._usable.pop(0)
        reason = self._reasons[len(self._usable) % len(self._reasons)]
        return Experience([EXAMPLE] if usable else [], {reason: 0.0 if usable else 1.0})

    def refresh_reference(self) -> None:
        pass

    def push_weights(self, *, require_all: bool = False) -> Metrics:
        return {}

    def save(self) -> None:
        if self.state.iteration != self.state.last_saved:
            self.saved.append(self.state.iteration)
        self.state.last_saved = self.state.iteration

    def finish_saving(self) -> None:
        self.finished = True
