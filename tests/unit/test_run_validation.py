"""When the loop of train.py measures held-out data, and what a stop or a full disk makes of it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from fake_run import FakeRun

from megatron_sip.config.held_out import ValidationSettings
from megatron_sip.experience.maker import Experience
from megatron_sip.metrics import Metrics
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.run import Run
from megatron_sip.stop_signal import StopSignal
from megatron_sip.train import TrainingError, run_steps


class ValidatedRun(FakeRun):
    """A run that is validated every two steps; `written` are the iterations of the metrics of steps and of validations."""

    def __init__(self, steps: int, iteration: int = 0) -> None:
        super().__init__([True] * steps, save_interval=100, iteration=iteration)
        self.settings = replace(self.settings, validation=ValidationSettings(2, 8, (), {}, SamplingSettings(1)))
        self.written: list[tuple[str, int]] = []
        self.stop = StopSignal()
        self.stop_at: int | None = None

    def measure(self, stop: StopSignal) -> Metrics | None:
        stop.requested = self.stop_at == self.state.iteration
        return None if stop.requested else {"validation/accuracy/quality": 0.5}

    def make_experience(self, stop: StopSignal, *args: Any) -> Experience | None:
        return None if stop.requested else super().make_experience(stop, *args)

    def write_metrics(self, metrics: Metrics, *, validation: bool = False) -> None:
        assert ("validation/accuracy/quality" in metrics) == validation
        self.written.append(("validation" if validation else "step", self.state.iteration))


def test_the_initial_weights_those_of_every_so_many_steps_and_the_last_ones_are_validated() -> None:
    run = ValidatedRun(3)
    assert run_steps(run, run.stop)
    assert run.written == [
        ("validation", 0),
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("step", 3),
        ("validation", 3),
    ]


def test_a_validation_that_a_stop_ends_is_made_first_when_the_run_goes_on() -> None:
    run = ValidatedRun(4)
    run.stop_at = 2
    assert not run_steps(run, run.stop)
    assert run.written == [("validation", 0), ("step", 1), ("step", 2)]
    assert run.saved == [2]
    resumed = ValidatedRun(2, iteration=2)
    assert run_steps(resumed, resumed.stop)
    assert resumed.written == [("validation", 2), ("step", 3), ("step", 4), ("validation", 4)]


def test_a_run_with_nothing_left_to_learn_is_validated_at_its_end() -> None:
    run = ValidatedRun(20)
    run._usable, run._reasons = [True, *[False] * 19], ["dropped/no spread"]
    assert run_steps(run, run.stop)
    assert run.written[-2:] == [("step", 11), ("validation", 11)]


def test_a_last_validation_that_a_stop_ends_is_made_before_the_run_is_concluded() -> None:
    run = ValidatedRun(3)
    run.stop_at = 3
    assert not run_steps(run, run.stop)  # so nothing is concluded, and the job is requeued
    assert (run.written[-1], run.saved) == (("step", 3), [3])
    resumed = ValidatedRun(0, iteration=3)
    assert run_steps(resumed, resumed.stop)
    assert resumed.written == [("validation", 3)]


def test_a_last_validation_that_a_full_disk_does_not_take_is_told() -> None:
    run = ValidatedRun(3)
    run.writer = SimpleNamespace(path="run/metrics.jsonl", write=lambda *_: None, write_validation=full)  # type: ignore[assignment]
    run.write_metrics = MethodType(Run.write_metrics, run)  # type: ignore[method-assign]
    with pytest.raises(
        TrainingError, match=r"run/metrics.jsonl took no more: No space left on device\. Step 3 is saved"
    ):
        run_steps(run, run.stop)


def full(step: int, numbers: dict[str, float]) -> None:
    if step == 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
