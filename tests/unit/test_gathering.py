"""Experience made a step ahead: in order, by the weights before the last update, once; and a kill anywhere changes nothing."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ahead_run import PROMPTS, STEPS, AheadRun, Disk, KilledError
from fake_run import FakeRun
from thread_exchange import ThreadExchange

from megatron_sip.experience.maker import Experience
from megatron_sip.files import DiskError
from megatron_sip.stop_signal import StopSignal
from megatron_sip.train import TrainingError, conclude, run_steps


def some_usable(task: int) -> bool:
    """Now and then a round is too small, and the step asks for another one."""
    return task % 11 not in (0, 5, 6)


def trained_by(disk: Disk, **how: Any) -> list[list[tuple[int, int]]]:
    """What each step of a run trains on that is started again after each kill."""
    while True:
        run = AheadRun(disk, **how)
        run.leader.usable = some_usable
        try:
            assert run_steps(run, StopSignal())
        except KilledError:
            continue
        return [disk.trained[step] for step in range(STEPS)]


def test_each_step_trains_on_the_next_tasks_by_the_weights_before_the_last_update() -> None:
    ahead, in_turn = Disk(), Disk()
    one, none = trained_by(ahead), trained_by(in_turn, staleness=0)
    assert [[task for task, _ in step] for step in one] == [[task for task, _ in step] for step in none]
    assert [{version for _, version in step} for step in none] == [{step} for step in range(STEPS)]
    assert [{version for _, version in step} for step in one] == [{0}, *({step} for step in range(STEPS - 1))]
    tasks = [task for step in one for task, _ in step]
    assert tasks == sorted(set(tasks))
    assert ahead.checkpoint[:2] == in_turn.checkpoint[:2]
    # Some steps asked for a second round; the cursor counts the tasks of those that were trained, and no others.
    assert ahead.checkpoint[1] > STEPS * PROMPTS
    assert ahead.checkpoint[1] % PROMPTS == 0


def test_killed_before_anything_that_takes_time_it_trains_on_the_same() -> None:
    whole = Disk()
    expected = trained_by(whole)
    for moment in range(len(whole.events)):
        disk = Disk(left=moment)
        assert trained_by(disk) == expected, whole.events[moment]
        assert disk.checkpoint[:2] == whole.checkpoint[:2]


def test_without_staleness_no_step_is_begun_before_its_time() -> None:
    disk = Disk()
    trained_by(disk, staleness=0)
    assert disk.events.index("push 3") < disk.events.index("begin 3") < disk.events.index("train 3")
    assert disk.checkpoint[2] is None


class TrainsMeanwhile(AheadRun):
    """Whose training waits until the next step's rollouts are asked for, and these until it has begun."""

    def train_step(self, examples: Any, reference: None, iteration: int) -> Any:
        self.training[iteration].set()
        if iteration + 1 < STEPS:
            assert self.asked[iteration + 1].wait(10.0)
        return super().train_step(examples, reference, iteration)


def test_experience_is_made_while_the_step_before_it_trains() -> None:
    run = TrainsMeanwhile(Disk())
    run.training = [threading.Event() for _ in range(STEPS)]  # type: ignore[attr-defined]
    run.asked = [threading.Event() for _ in range(STEPS)]  # type: ignore[attr-defined]

    def seconds(step: int) -> float:
        run.asked[step].set()  # type: ignore[attr-defined]
        assert step == 0 or run.training[step - 1].wait(10.0)  # type: ignore[attr-defined]
        return 0.0

    run.leader.seconds = seconds
    assert run_steps(run, StopSignal())
    assert [metrics["staleness"].value for metrics in run.logged] == [0, *[1] * (STEPS - 1)]  # type: ignore[union-attr]
    assert ["seconds/ahead/rollout" in metrics for metrics in run.logged] == [False, *[True] * (STEPS - 1)]
    assert ["seconds/rollout" in metrics for metrics in run.logged] == [True, *[False] * (STEPS - 1)]
    assert ["seconds/waiting" in metrics for metrics in run.logged] == [*[True] * (STEPS - 1), False]


class TwoLeaders:
    """One of two ranks, threads, each of which is a replica's leader."""

    is_leader, num_replicas = True, 2

    def __init__(self, replica: int, exchange: ThreadExchange) -> None:
        self.replica, self._exchange = replica, exchange

    def all_gather_from_leaders(self, mine: Any) -> list[Any]:
        return self._exchange(self.replica, mine)

    def any_rank(self, flag: bool) -> bool:
        return any(self._exchange(self.replica, flag))

    def barrier(self) -> None:
        self._exchange(self.replica, None)


def test_two_leaders_whose_shares_come_in_any_order_train_on_the_same_list() -> None:
    exchange, one = ThreadExchange(2), Disk()
    expected = trained_by(one)
    disks = [Disk(), Disk()]

    def rank(replica: int) -> list[list[tuple[int, int]]]:
        run = AheadRun(disks[replica], exchange=TwoLeaders(replica, exchange))
        run.leader.usable = some_usable
        run.leader.seconds = lambda step: 0.003 * ((step + replica) % 2)
        assert run_steps(run, StopSignal())
        return [disks[replica].trained[step] for step in range(STEPS)]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(rank, range(2))) == [expected, expected]
    assert disks[0].checkpoint == disks[1].checkpoint == one.checkpoint


def test_a_stop_while_experience_is_under_way_leaves_it_to_the_run_that_goes_on() -> None:
    disk, stop = Disk(), StopSignal()
    run = AheadRun(disk, save_interval=100)

    def stopped(made: Any) -> Any:
        stop.requested = stop.requested or (made.metrics["staleness"].value == 1 and len(disk.trained) == 3)
        return None if stop.requested else made

    run.leader.changes = stopped
    assert not run_steps(run, stop)
    iteration, cursor, ahead = disk.checkpoint
    assert (iteration, cursor, ahead) == (len(disk.trained), iteration * PROMPTS, None)
    trained = trained_by(disk)
    assert {version for _, version in trained[iteration]} == {iteration}  # by its own weights: nobody had any ahead
    assert {version for _, version in trained[iteration + 1]} == {iteration}
    assert next(task for step in trained[iteration:] for task, _ in step) >= cursor


def test_a_stop_between_two_steps_keeps_what_was_made_and_trains_no_more() -> None:
    disk, stop = Disk(), StopSignal()
    expected = trained_by(Disk())
    run = AheadRun(disk, save_interval=100)
    run.leader.usable = some_usable
    pushed = run.push_weights

    def push(**how: Any) -> Any:
        stop.requested = run.state.iteration == 3
        return pushed(**how)

    run.push_weights = push  # type: ignore[method-assign]
    assert not run_steps(run, stop)
    assert disk.checkpoint[0] == len(disk.trained) == 3
    assert disk.checkpoint[2] is not None
    assert trained_by(disk) == expected


def test_what_could_not_be_recorded_is_made_again() -> None:
    disk = Disk()
    run = AheadRun(disk, save_interval=100)

    def unrecorded(made: Experience) -> Experience:
        return replace(made, unrecorded="--save-groups g took no more" if made.examples[0].task_index else None)

    run.leader.changes = unrecorded
    with pytest.raises(TrainingError, match=r"^--save-groups g took no more\. Step 1 is saved"):
        run_steps(run, StopSignal())
    assert disk.checkpoint == (1, PROMPTS, None)


def lost_at_step_3(made: Experience) -> Experience:
    """Three of its four groups find no judge."""
    lost = {"groups": 4.0, "dropped/judge-quality-timeout": 3.0}
    return replace(made, metrics=made.metrics | lost) if made.examples[0].task_index == 2 * PROMPTS else made


def test_a_step_most_of_which_was_lost_makes_no_update(capsys: pytest.CaptureFixture[str]) -> None:
    run = AheadRun(Disk(), save_interval=1)
    run.leader.changes = lost_at_step_3
    assert run_steps(run, StopSignal())
    assert [len(run.disk.trained[step]) for step in range(4)] == [4, 4, 0, 4]
    assert (
        "step 3: no update, since more than 50% of its groups are lost (judge-quality-timeout 3)"
        in capsys.readouterr().out
    )


def test_a_checkpoint_keeps_no_outage_and_the_run_that_goes_on_tries_its_tasks_again() -> None:
    disk = Disk()
    run = AheadRun(disk, save_interval=1)
    run.leader.changes = lost_at_step_3

    save = run.save

    def saved_and_killed_at_2() -> None:
        save()
        if run.state.iteration == 2:
            raise KilledError

    run.save = saved_and_killed_at_2  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        run_steps(run, StopSignal())
    assert disk.checkpoint == (2, 2 * PROMPTS, None)
    resumed = AheadRun(disk)
    assert run_steps(resumed, StopSignal())
    assert disk.trained[2] == [(task, 2) for task in range(2 * PROMPTS, 3 * PROMPTS)]


def test_a_run_of_other_flags_makes_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    disk = Disk(left=10)
    with pytest.raises(KilledError):
        run_steps(AheadRun(disk, save_interval=1), StopSignal())
    assert disk.checkpoint[2] is not None
    assert AheadRun(disk).ahead is not None
    assert capsys.readouterr().out == ""
    assert AheadRun(disk, staleness=0).ahead is None
    assert "made ahead by a run of other flags" in capsys.readouterr().out


def ending(run: AheadRun, stop: StopSignal) -> str:
    """How a run ends: with what words."""
    try:
        return str(run_steps(run, stop))
    except TrainingError as error:
        return str(error.code)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("reason", ["", "the teacher is gone"])
@pytest.mark.parametrize("asked", range(1, 6))
def test_both_of_two_leaders_end_alike_where_one_is_stopped(staleness: int, reason: str, asked: int) -> None:
    """By a signal, or because its judge is gone; in whatever step, ahead or not."""
    exchange, disks = ThreadExchange(2), [Disk(), Disk()]

    def rank(replica: int) -> str:
        run = AheadRun(disks[replica], staleness, TwoLeaders(replica, exchange), save_interval=100)
        run.settings = replace(run.settings, run=replace(run.settings.run, rank=replica))
        stop, made = StopSignal(), []

        def stopped(experience: Experience) -> Experience | None:
            made.append(experience)
            if replica == 1 and len(made) == asked:
                stop.requested, stop.reason = True, reason
            return None if stop.requested else experience

        run.leader.changes = stopped
        return ending(run, stop)

    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(rank, range(2)))
    step = disks[0].checkpoint[0]
    assert disks[0].checkpoint[:2] == disks[1].checkpoint[:2] == (step, step * PROMPTS)
    assert 0 <= asked - 1 - step <= staleness
    assert disks[0].trained.keys() == disks[1].trained.keys()
    told = f"{reason}. Step {step} is saved, the same command continues"
    assert ends == ([told, "1"] if reason else ["False", "False"])


class Comparison:
    """One that fails, or whose judge is gone."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    async def finish(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, DiskError("full")])
def test_a_comparison_that_fails_ends_all_ranks(error: DiskError | None) -> None:
    exchange = ThreadExchange(2)

    def rank(replica: int) -> BaseException:
        run, stop = FakeRun([True], 1, rank=replica), StopSignal()
        run.exchange, run.comparison = TwoLeaders(replica, exchange), Comparison(error)  # type: ignore[assignment]
        if error is None and replica == 0:
            stop.request("the eval judge is gone")
        run.leader = SimpleNamespace(  # type: ignore[assignment]
            engines=0, eval_judge=0, judged=lambda work, *_: asyncio.run(work)
        )
        with pytest.raises((TrainingError, DiskError)) as caught:
            conclude(run, stop)
        return caught.value

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(rank, range(2))
    assert isinstance(second, TrainingError)
    assert second.code == 1
    assert str(first).startswith("the eval judge is gone. All steps are saved" if error is None else "full")
