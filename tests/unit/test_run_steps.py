"""The loop of train.py, with the parts of a run faked: when checkpoints are saved, and what ends a run without signal."""

from __future__ import annotations

import argparse
import errno
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from fake_run import EXAMPLE, FakeRun
from torch.distributed.checkpoint import CheckpointException

from megatron_sip.experience.maker import Experience
from megatron_sip.files import DiskError
from megatron_sip.metrics import Metrics
from megatron_sip.records import Example
from megatron_sip.rollout.handshake import WeightSyncError
from megatron_sip.run import Run, RunState
from megatron_sip.stop_signal import StopSignal
from megatron_sip.train import MAX_EMPTY_STEPS, TrainingError, forget_outcome, run_steps
from megatron_sip.training.checkpoints import saving_explained


def test_checkpoints_come_at_every_interval_and_at_the_end() -> None:
    run = FakeRun([True] * 8, save_interval=3)
    assert run_steps(run, StopSignal())
    assert run.saved == [3, 6, 8]
    resumed = FakeRun([True] * 4, save_interval=3, iteration=5)  # after a stop
    assert run_steps(resumed, StopSignal())
    assert resumed.saved == [6, 9]


@pytest.mark.parametrize("interval", [2, 100])
def test_a_run_without_any_usable_group_ends_and_saves_what_was_trained_before(interval: int) -> None:
    run = FakeRun([True, True, *[False] * 20], save_interval=interval)
    with pytest.raises(TrainingError, match=rf"in {MAX_EMPTY_STEPS} steps in a row; .*'no verdict': 10.0"):
        run_steps(run, StopSignal())
    assert (run.state.iteration, run.state.consumed_samples) == (2, 2)
    assert run.saved == [2]  # the same command tries the tasks after step 2 again
    assert run.finished  # a checkpoint still being written is not lost


@pytest.mark.parametrize("ends", ["stop", "trouble"])
def test_what_ends_a_run_among_empty_steps_saves_none_of_them(ends: str) -> None:
    run, stop = FakeRun([True, True, *[False] * 6], save_interval=100), StopSignal()
    made = run.make_experience

    def ended_in_the_fifth(stop: StopSignal, number: int) -> Experience | None:
        if run.state.iteration == 4:
            stop.request("the teacher ended" if ends == "trouble" else "")
        return made(stop, number)

    run.make_experience = ended_in_the_fifth  # type: ignore[method-assign, assignment]
    if ends == "stop":
        assert not run_steps(run, stop)
    else:
        with pytest.raises(TrainingError, match=r"the teacher ended\. Step 2 is saved"):
            run_steps(run, stop)
    assert (run.saved, run.state.iteration, run.state.consumed_samples) == ([2], 2, 2)


def test_a_run_whose_last_steps_are_empty_is_done_with_them() -> None:
    run = FakeRun([True, False, False], save_interval=100)
    assert run_steps(run, StopSignal())
    assert (run.saved, run.state.trained) == ([3], (3, 3))


def test_a_reference_that_an_empty_step_made_is_kept() -> None:
    """Once: the policy does not change in the steps behind it, and their tasks are asked again."""
    run = FakeRun([True, *[False] * 20], save_interval=100)
    copies: list[int] = []
    run.reference = SimpleNamespace(copy_policy=lambda: copies.append(run.state.iteration))  # type: ignore[assignment]
    run.settings = replace(run.settings, reference=replace(run.settings.reference, update_interval=3))
    run.refresh_reference = MethodType(Run.refresh_reference, run)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="Step 3 is saved"):
        run_steps(run, StopSignal())
    assert (run.saved, copies, run.unsaved_reference) == ([3], [3], 3)


def test_a_run_with_nothing_left_to_learn_ends_as_a_finished_one_and_the_same_command_trains_no_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = FakeRun([True, True, *[False] * 20], save_interval=100, empty="no spread")
    assert run_steps(run, StopSignal())
    assert (run.saved, run.state.iteration) == ([12], 12)
    assert run.finished
    assert re.search("nothing left to learn: in 10 steps .*; the run ends with step 12", capsys.readouterr().out)
    args = argparse.Namespace()
    run.state.write_into(args)  # of which a checkpoint is made
    again = FakeRun([True] * 8, save_interval=100, iteration=12)
    again.state = RunState.loaded(args, args, None)
    assert run_steps(again, StopSignal())
    assert (again.state.iteration, again.saved) == (12, [])


@pytest.mark.parametrize(("reasons", "trained"), [(["no spread", "no verdict"], 2), (["no spread"] * 9 + ["x"], 2)])
def test_an_outage_among_steps_without_spread_is_an_outage(reasons: list[str], trained: int) -> None:
    """Whatever the last of them says."""
    run = FakeRun([True] * trained + [False] * 20, save_interval=2, empty=reasons)
    with pytest.raises(TrainingError, match=r"reasons: \{.*'no spread': \d.*Step 2 is saved: once judge"):
        run_steps(run, StopSignal())
    assert run.saved == [2]


def with_metrics(made: Experience, more: Metrics) -> Experience:
    return replace(made, metrics=made.metrics | more)


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_a_rewriter_that_refuses_every_call_among_ties_is_an_outage(least: float) -> None:
    run = FakeRun([False] * 20, save_interval=2, iteration=20, empty="tied")
    run.settings = replace(run.settings, run=replace(run.settings.run, min_usable_share=least))
    made = run.make_experience
    lost = {"rewriter/dropped/failed": 5.0, "groups": 5.0}
    run.make_experience = lambda stop, number: with_metrics(made(stop), lost)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"'tied': .*'rewrite failed': .*Step 20 is saved: once judge, rewriter"):
        run_steps(run, StopSignal())
    assert not run.state.learnt


def test_a_single_rewrite_that_failed_is_none() -> None:
    run = FakeRun([False] * 20, save_interval=2, iteration=20, empty="tied")
    made = run.make_experience
    lost = {"rewriter/dropped/failed": 1.0, "groups": 5.0}
    run.make_experience = lambda stop, number: with_metrics(made(stop), lost)  # type: ignore[method-assign]
    assert run_steps(run, StopSignal())
    assert run.state.learnt


@pytest.mark.parametrize(("iteration", "learnt", "goes_on"), [(0, False, True), (3, False, False), (0, True, False)])
def test_a_run_that_goes_on_forgets_that_it_had_ended(
    tmp_path: Path, iteration: int, learnt: bool, goes_on: bool
) -> None:
    """Else a stop of the continued run would pass for its end, and its weights for the trained ones."""
    run = FakeRun([True] * 3, save_interval=2)
    run.settings = replace(run.settings, run=replace(run.settings.run, run_dir=tmp_path))
    run.state.iteration, run.state.learnt = iteration, learnt
    outcome = {"summary.json", "comparisons.jsonl", "report.html"}
    for name in (*outcome, "metrics.jsonl"):
        (tmp_path / name).touch()
    forget_outcome(run)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"} | (set() if goes_on else outcome)


def test_a_run_that_never_learnt_anything_is_no_finished_one() -> None:
    run = FakeRun([False] * 20, save_interval=2, empty="no spread")
    with pytest.raises(TrainingError, match="score the same from the first step on, they always"):
        run_steps(run, StopSignal())
    assert run.saved == []


class OverloadedRun(FakeRun):
    """Of whose four groups a step, in the first two steps three find no judge."""

    def make_experience(self, stop: StopSignal, round_index: int = 0) -> Experience:
        lost = 3.0 if self.state.iteration < 2 else 1.0
        return Experience([EXAMPLE], {"groups": 4.0, "dropped/judge-quality-timeout": lost})

    def train_step(self, examples: Sequence[Example], reference: None, iteration: int) -> Metrics:
        self.trained = [*getattr(self, "trained", []), len(examples)]
        return {}


def test_a_step_most_of_whose_groups_are_lost_makes_no_update_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    run = OverloadedRun([True] * 4, save_interval=100)
    assert run_steps(run, StopSignal())
    assert run.trained == [0, 0, 1, 1]
    shown = capsys.readouterr().out
    assert "step 2: no update, since more than 50% of its groups are lost (judge-quality-timeout 3)" in shown
    assert "step 3: no update" not in shown


class SharingRun(FakeRun):
    """That notes what happens in a step."""

    def __init__(self) -> None:
        super().__init__([True] * 2, save_interval=100)
        self.events: list[str] = []
        self.sharing: Any = SimpleNamespace(to_trainer=lambda: self.events.append("lend"))

    def make_experience(self, stop: StopSignal, round_index: int = 0) -> Experience:
        self.events.append("experience")
        return super().make_experience(stop, round_index)

    def train_step(self, examples: Sequence[Example], reference: None, iteration: int) -> Metrics:
        self.events.append("train")
        return {}

    def push_weights(self, *, require_all: bool = False) -> Metrics:
        self.events.append("push")
        return {}


def test_engines_lend_their_memory_between_experience_and_training() -> None:
    run = SharingRun()
    assert run_steps(run, StopSignal())
    assert run.events == ["experience", "lend", "train", "push"] * 2


def test_a_checkpoint_that_is_due_at_an_empty_step_comes_after_the_next_usable_one() -> None:
    run = FakeRun([True, False, False, True, True, False], save_interval=2)
    assert run_steps(run, StopSignal())
    assert run.saved == [4, 6]


class FullDisk:
    """A writer of metrics on a disk that takes no more from step 3 on."""

    path = "run/metrics.jsonl"

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if step >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_metrics_that_a_full_disk_does_not_take_end_the_run_with_its_step_saved() -> None:
    run = FakeRun([True] * 8, save_interval=100)
    run.writer = FullDisk()  # type: ignore[assignment]
    with pytest.raises(
        TrainingError, match=r"run/metrics.jsonl took no more: No space left on device\. Step 3 is saved"
    ):
        run_steps(run, StopSignal())
    assert run.saved == [3]
    assert run.finished


def test_groups_that_a_full_disk_does_not_take_end_every_rank_with_the_step_saved() -> None:
    run = FakeRun([True] * 8, save_interval=100)
    made = run.make_experience
    run.make_experience = lambda stop, round_index: replace(made(stop), unrecorded="--save-groups g took no more")  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"^--save-groups g took no more\. Step 1 is saved"):
        run_steps(run, StopSignal())
    assert run.saved == [1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        CheckpointException(
            "write",
            {
                0: (
                    RuntimeError(
                        "Worker failure: Local process 0 encountered an error: [Errno 28] No space left on device"
                    ),
                    [],
                )
            },  # type: ignore[dict-item]
        ),
    ],
)
def test_a_full_disk_while_saving_is_told_with_its_place_and_the_step_that_is_safe(
    tmp_path: Path, error: Exception
) -> None:
    with (
        pytest.raises(
            DiskError, match=rf"{tmp_path}: no space left on device while step 15 was saved; no step is saved"
        ),
        saving_explained(tmp_path, 15),
    ):
        raise error
    for step in (5, 10, 15):
        folder = tmp_path / f"iter_{step:07d}"
        folder.mkdir()
        (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}' if step < 15 else "")
    with pytest.raises(DiskError, match="while step 15 was saved; step 10 is safe"), saving_explained(tmp_path, 15):
        raise error


def test_other_errors_while_saving_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), saving_explained(tmp_path, 15):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_single_steps_without_a_finite_gradient_are_passed() -> None:
    run = FakeRun([True] * 8, save_interval=100, bad=[2, 3, 5, 8])
    assert run_steps(run, StopSignal())
    assert (run.saved, run.state.consumed_samples, run.state.non_finite_steps) == ([8], 8, 1)


def test_three_in_a_row_end_the_run_behind_their_batches() -> None:
    run = FakeRun([True] * 9, save_interval=100, bad=[4, 5, 6])
    with pytest.raises(TrainingError, match=r"3 steps in a row, up to step 6, .* Checkpoint 6 .*lower --lr"):
        run_steps(run, StopSignal())
    assert run.saved == [6]  # a requeued job does not meet the same batches
    assert run.finished
    requeued = FakeRun([True] * 3, save_interval=100, iteration=6, before=run.state.non_finite_steps)
    assert run_steps(requeued, StopSignal())
    assert requeued.state.non_finite_steps == 0


def test_a_policy_that_gives_no_finite_gradient_any_more_ends_each_requeued_job_at_once() -> None:
    """And saves no more: a SLURM job gives up after some starts at one checkpoint."""
    run = FakeRun([True] * 9, save_interval=1, iteration=6, before=3, bad=range(7, 20))
    with pytest.raises(
        TrainingError,
        match=r"4 steps in a row, up to step 7, .* Checkpoint 6 has .*from before.* tries those since then again: ",
    ):
        run_steps(run, StopSignal())
    assert run.saved == []


def test_a_step_without_examples_neither_adds_to_them_nor_ends_their_row() -> None:
    run = FakeRun([True, True, False, True, True], save_interval=100, bad=[1, 2, 3, 4])
    with pytest.raises(TrainingError, match="3 steps in a row, up to step 4"):
        run_steps(run, StopSignal())


@pytest.mark.parametrize("rank", [0, 3])
def test_engines_that_none_took_weights_end_every_rank_with_the_step_saved_and_one_says_why(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sip.run.export_hf_weights", lambda *_, **__: iter(()))  # asks for Megatron's groups
    run = FakeRun([True] * 8, save_interval=100, rank=rank)
    run.weight_sync = Unreachable()  # type: ignore[assignment]
    run.trainer.model, run.hf_config = [], None
    run.push_weights = MethodType(Run.push_weights, run)  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as caught:
        run_steps(run, StopSignal())
    told = "the engines did not get the weights of step 1: 'no engine' answers. Step 1 is saved, the same command continues"
    assert caught.value.code == (told if rank == 0 else 1)
    assert run.saved == [1]
    with pytest.raises(WeightSyncError, match="'no engine' answers"):
        run.push_weights(require_all=True)


class Unreachable:
    """A weight sync that reaches no engine."""

    urls = ("http://a",)

    def push(self, _: Any, version: str, *, require_all: bool) -> dict[str, str]:
        raise WeightSyncError("'no engine' answers")


def test_a_checkpoint_keeps_the_state_under_the_names_that_earlier_ones_have() -> None:
    args = argparse.Namespace(iteration=6, consumed_train_samples=24, save="run")
    state = RunState.loaded(args, argparse.Namespace(non_finite_steps=1), "tasks")
    assert state == RunState(6, 24, last_saved=6, non_finite_steps=1, task_fingerprint="tasks")
    state.iteration, state.consumed_samples, state.non_finite_steps = 7, 28, 0
    assert args.iteration == 6  # nothing is written before a save
    state.write_into(args)
    kept = {
        "iteration": 7,
        "consumed_train_samples": 28,
        "non_finite_steps": 0,
        "task_fingerprint": "tasks",
        "learnt": False,
        "experience_ahead": None,
        "save": "run",
    }
    assert vars(args) == kept
    beginning = RunState.loaded(argparse.Namespace(iteration=0, consumed_train_samples=0), None, "tasks")
    assert beginning.last_saved is None


class Rounds(FakeRun):
    """A run of batches of two tasks, of which the entries of `usable` are usable; its steps ask for up to three rounds."""

    def __init__(self, usable: Sequence[int], steps: int) -> None:
        super().__init__([True] * steps, save_interval=1000)
        run = replace(self.settings.run, prompts=2, oversample=3)
        self.settings = replace(self.settings, run=run)
        self.trained: list[list[int]] = []
        self.logged: list[Metrics] = []
        self.asked: list[int] = []
        self._rounds = list(usable)

    def make_experience(self, stop: StopSignal, round_index: int = 0) -> Experience:
        self.asked.append(round_index)
        usable = self._rounds.pop(0)
        first = 10 * len(self.asked)
        examples = [replace(EXAMPLE, task_index=first + number) for number in range(usable)]
        return Experience(examples, {"groups": 2.0, "seconds/rollout": 1.5})

    def train_step(self, examples: Sequence[Example], reference: None, iteration: int) -> Metrics:
        self.trained.append([example.task_index for example in examples])
        return {}

    def write_metrics(self, metrics: Metrics) -> None:
        self.logged.append(metrics)


def test_further_rounds_are_asked_until_the_batch_is_full_and_the_cursor_counts_them() -> None:
    run = Rounds([2, 1, 0, 2, 0, 1, 0], steps=3)
    assert run_steps(run, StopSignal())
    assert run.asked == [0, 0, 1, 2, 0, 1, 2]
    assert run.trained == [
        [10, 11],
        [20, 40],
        [60],
    ]  # of the fourth round one finds no room; the third step stays short
    assert [metrics["grpo/rounds"] for metrics in run.logged] == [1, 3, 3]
    assert [metrics["grpo/surplus"] for metrics in run.logged] == [0, 1, 0]
    assert [metrics["groups"] for metrics in run.logged] == [2, 6, 6]
    assert [metrics["seconds/rollout"] for metrics in run.logged] == [1.5, 4.5, 4.5]
    assert run.state.consumed_samples == 7 * 2


def test_a_stop_in_a_later_round_forgets_the_step() -> None:
    run = Rounds([2, 1, 0], steps=3)
    made = run.make_experience
    run.make_experience = lambda stop, number: made(stop, number) if len(run.asked) < 2 else None  # type: ignore
    assert not run_steps(run, StopSignal())
    assert (run.saved, run.state.consumed_samples) == ([1], 2)


def test_a_server_that_is_given_up_in_a_step_ends_the_run_as_failed_with_the_step_before_saved() -> None:
    run, stop = FakeRun([True, True], save_interval=9), StopSignal()
    made = run.make_experience

    def lost_in_the_second(stop: StopSignal, number: int) -> Experience | None:
        if run.state.iteration == 0:
            return made(stop, number)
        stop.request("the teacher ended")
        stop.request("so did the rewriter")
        return None

    run.make_experience = lost_in_the_second  # type: ignore[method-assign, assignment]
    with pytest.raises(TrainingError, match=r"^the teacher ended\. Step 1 is saved, the same command continues$"):
        run_steps(run, stop)
    assert (run.saved, run.state.consumed_samples) == ([1], 1)


def test_a_round_s_tasks_are_the_next_batch_s_share_and_end_with_the_run() -> None:
    run = Rounds([], steps=4)
    run.state.iteration, run.state.consumed_samples = 3, 10
    run.exchange = SimpleNamespace(num_replicas=2, replica=1)
    run.tasks = SimpleNamespace(tasks=lambda start, count: list(range(start, start + count)))  # type: ignore[assignment]
    assert [run.my_tasks(ahead) for ahead in range(4)] == [[11], [13], [15], []]
