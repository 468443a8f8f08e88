"""Pretrain a policy by Self-Improving Pretraining.

    python -m megatron_sip.train --pretrained-checkpoint CKPT --save RUN --data-path 'text/*.jsonl' \\
        --seq-length 2048 --global-batch-size 256 --train-iters 2000 --lr 5e-6 \\
        --rollout-local 1 --teacher-model TEACHER            # one process; or under torchrun, or srun (examples/)

The same command again continues the run at its last checkpoint. `--help` lists our flags, `--help-megatron` all others.
The whole step is `run_steps`:

    leaders: tasks -> rollouts, rewrites -> judge -> select -+
                                                             +-> everyone: train -> push weights -> save -> log

With --max-staleness 1 the leaders make the next step's experience meanwhile (`gathering.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.child_processes import kill_with_parent
from megatron_sip.config.checks import explained
from megatron_sip.config.dry_run import describe
from megatron_sip.config.early_checks import check_flags
from megatron_sip.config.parse import megatron_help, parse_arguments
from megatron_sip.config.presets import expand_presets
from megatron_sip.config.settings import Settings
from megatron_sip.console import quiet, say
from megatron_sip.errors import ArgumentError, UserError
from megatron_sip.evaluation.held_out import HeldOutOutcome
from megatron_sip.evaluation.run_record import run_record, write_run_record
from megatron_sip.experience.rounds import FAILED_REWRITES, is_representative, lost_groups
from megatron_sip.experience.selection import ALL_ALIKE
from megatron_sip.files import DiskError
from megatron_sip.gathering import begin_ahead, finish_ahead, take_experience
from megatron_sip.metrics import Metrics, merge
from megatron_sip.stop_signal import StopSignal
from megatron_sip.training.non_finite import MAX_NON_FINITE_STEPS, in_a_row
from megatron_sip.training.run_lock import RunLock

if TYPE_CHECKING:
    from megatron_sip.run import Run

MAX_EMPTY_STEPS = 10
"""A run whose judge or engines are gone for good must not spend its data on steps without an update."""


class TrainingError(SystemExit):
    """Training cannot go on; on rank 0 the message says why, what is saved and what to do."""


def main() -> None:
    """Set up, train, compare. Exits 0 after the last step, or after a SIGTERM or Ctrl-C with the last step saved."""
    given = expand_presets(sys.argv[1:])
    flags = check_flags(given)
    with contextlib.ExitStack() as stack:
        if not flags.verbose:
            with explained("--save or --run-dir"):
                stack.enter_context(quiet(log_file(flags), announce=process_rank() == 0))
        if process_rank() == 0 and not (flags.dry_run or flags.help_megatron):
            lock_folders(flags, stack)
        try:
            run_command(given, flags)
        except KeyboardInterrupt:
            sys.exit("Ctrl-C before the first step: there is nothing to save")


def log_file(flags: argparse.Namespace) -> Path | None:
    """Where this process's noise goes; None (nowhere) when it only answers a question."""
    if flags.dry_run or flags.help_megatron:
        return None
    rank = process_rank()
    # Not trainer.log: examples/slurm_job.sh keeps there what would be on the screen.
    return Path(flags.run_dir or flags.save) / "logs" / (f"output.rank_{rank}.log" if rank else "output.log")


def process_rank() -> int:
    """This process's number, as Megatron finds it: torchrun and examples/slurm_job.sh set RANK."""
    return int(os.environ.get("RANK", "0"))


def run_command(given: Sequence[str], flags: argparse.Namespace) -> None:
    """Do what the command line asks for; the slow imports begin here."""
    from megatron_sip.platform.megatron import prepare_megatron, rendezvous_store

    prepare_megatron()  # before anything imports Megatron
    if flags.help_megatron:
        say(megatron_help())
        return
    settings = Settings.from_args(parse_arguments(given))
    if flags.dry_run:
        say(describe(settings))
        return
    import torch.distributed as dist
    from megatron.training.initialize import initialize_megatron

    from megatron_sip.run import set_up
    from megatron_sip.training.leaders import connected_when_used

    with contextlib.ExitStack() as stack:
        if settings.run.rank == 0:
            write_run_record(settings.run.run_dir, run_record(given, flags, os.environ))
        with connected_when_used():  # Megatron's gloo groups of hundreds of replicas, which no step uses
            initialize_megatron(allow_no_cuda=True, store=rendezvous_store())
        stop = stack.enter_context(StopSignal())
        try:
            run = set_up(settings, stack)
            if run.servers is not None:
                run.servers.keep(stop)
            with run.watch:
                forget_outcome(run)
                if run_steps(run, stop):
                    conclude(run, stop)
        except UserError as error:
            raise ArgumentError(f"{type(error).__name__}: {error}") from error
        run.exchange.barrier()
    dist.destroy_process_group()


def lock_folders(flags: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Keep other runs out of this run's folders until `stack` ends; before anything, wandb's run too, is continued there."""
    try:
        for folder in sorted({Path(flags.save).resolve(), Path(flags.run_dir or flags.save).resolve()}):
            stack.enter_context(RunLock(folder))
    except (UserError, OSError) as error:
        raise ArgumentError(f"--save, --run-dir: {error}") from error


def forget_outcome(run: Run) -> None:
    """Remove what an earlier end of a run that goes on has written: it is of other weights, and says that the run has ended."""
    state, settings = run.state, run.settings.run
    if settings.rank == 0 and state.iteration < settings.steps and not state.learnt:
        for name in ("summary.json", "comparisons.jsonl", "report.html"):
            (settings.run_dir / name).unlink(missing_ok=True)


def run_steps(run: Run, stop: StopSignal) -> bool:
    """All remaining steps; False when a stop was requested (the last finished step is then saved)."""
    state, exchange, settings = run.state, run.exchange, run.settings.run
    saving: Metrics = {}  # of the step before: a step's line is written before its checkpoint, or a kill could lose it
    empty: list[Metrics] = []  # of the steps without an example since the last one
    started = time.monotonic()
    while state.iteration < settings.steps and not state.learnt:
        started += validate(run, stop)  # its time is no step's
        run.watch.begins(f"step {state.iteration + 1}")
        made = take_experience(run, stop)
        if made is None:
            return stop_early(run, stop)
        under_way = begin_ahead(run, stop, made.rounds)
        examples, metrics = made.examples, made.metrics | saving
        if run.sharing is not None:
            run.sharing.to_trainer()
        run.watch.doing("training")
        metrics |= run.trainer.train_step(examples, run.reference, state.iteration)
        state.non_finite_steps = in_a_row(state.non_finite_steps, metrics, trained=bool(examples))
        state.iteration += 1
        state.consumed_samples += made.rounds * settings.prompts
        if examples:
            state.note_trained()
        run.refresh_reference()
        if under_way is not None:
            metrics |= timed("seconds/waiting", partial(finish_ahead, run, stop, under_way))
        stopping = exchange.any_rank(stop.requested)  # then the engines may be stopping as well: do not push to them
        if not stopping:
            # All replicas wait: rollouts asked for before the push would be of the old weights.
            metrics |= timed("seconds/sync", run.push_weights, run.exchange.barrier)
        metrics["seconds/total"] = time.monotonic() - started
        started = time.monotonic()
        run.troubles += [trouble if settings.rank == 0 else "" for trouble in made.unrecorded]
        run.write_metrics(metrics)
        end_in_trouble(run, stop)
        if stopping:
            return stop_early(run, stop)
        if examples and state.non_finite_steps >= MAX_NON_FINITE_STEPS:
            if state.non_finite_steps == MAX_NON_FINITE_STEPS:  # a job that is requeued passes these batches, once
                run.save()
            run.finish_saving()
            raise TrainingError(no_finite_step(run) if settings.rank == 0 else 1)
        empty = [] if examples else [*empty, metrics]
        if len(empty) == MAX_EMPTY_STEPS:
            end_without_examples(run, empty)
        # Not after an empty step: a job that is restarted again and again would eat its data without learning.
        is_last = state.iteration == settings.steps or state.learnt
        if is_last:
            state.note_trained()
        is_due = (run.save_is_due() and bool(examples)) or is_last
        saving = timed("seconds/save", run.save) if is_due else {}
    run.finish_saving()
    validate(run, stop, last=True)
    end_in_trouble(run, stop)
    return stop_early(run, stop) if exchange.any_rank(stop.requested) else True


def validate(run: Run, stop: StopSignal, *, last: bool = False) -> float:
    """Measure the present weights on held-out records, where if that is due, as for the `last` ones; the seconds that it took.

    A stop ends it without numbers. Then, as after a kill, they are missing, and the same command measures them first.
    """
    started, settings, state = time.monotonic(), run.settings, run.state
    if settings.validation.is_due(state.iteration, state.iteration if last else settings.run.steps):
        numbers = run.exchange.all_gather_from_leaders(run.measure(stop))[0]
        if numbers is not None:
            run.write_metrics(numbers, validation=True)
    return time.monotonic() - started


def conclude(run: Run, stop: StopSignal) -> None:
    """What rank 0 has left to do after the last step. Raises TrainingError on all ranks, or on rank 0 DiskError."""
    run.watch.begins("the comparison")
    run.exchange.barrier()  # the last metrics are written
    failure: TrainingError | UserError | None = None
    if run.settings.run.rank == 0:
        try:
            compare_and_report(run, stop)
        except (TrainingError, UserError) as error:
            failure = error
    if run.exchange.any_rank(failure is not None):  # else the others would wait for one that has ended
        raise failure or TrainingError(1)


def compare_and_report(run: Run, stop: StopSignal) -> None:
    """Compare the trained policy with the initial one, and write summary, plots and report, unless stopped."""
    from megatron_sip.evaluation.outcome import outcome_line, write_outcome  # with matplotlib

    held_out: HeldOutOutcome | None = None
    leader = run.leader
    if (
        run.comparison is not None
        and leader is not None
        and leader.engines is not None
        and leader.eval_judge is not None
    ):
        version = str(run.state.iteration)
        say("comparison: the trained policy continues the same held-out prefixes, then both are judged")
        comparing = run.comparison.finish(leader.engines, leader.eval_judge, version)
        held_out = leader.judged(comparing, stop, leader.eval_judge)
        if held_out is None:
            if stop.reason:
                raise TrainingError(f"{stop.reason}. All steps are saved, the same command makes the comparison")
            say("stopped on request: all steps are saved, the same command makes the comparison")
            return
    run_dir = run.settings.run.run_dir
    try:
        say(outcome_line(run_dir, write_outcome(run_dir, held_out)))
    except OSError as error:
        raise DiskError(f"all steps are saved, but not the report, which the same command writes: {error}") from error


def end_in_trouble(run: Run, stop: StopSignal) -> None:
    """Save the present step and raise TrainingError where any rank has troubles; one that has no words for them only ends."""
    if run.exchange.any_rank(bool(run.troubles or stop.reason)):
        run.save_what_was_trained()
        reason = next(
            filter(None, run.exchange.all_gather_from_leaders(stop.reason)), ""
        )  # all may have found the same
        told = "; ".join(filter(None, [reason if run.settings.run.rank == 0 else "", *run.troubles]))
        raise TrainingError(f"{told}. Step {run.state.iteration} is saved, the same command continues" if told else 1)


def end_without_examples(run: Run, empty: Sequence[Metrics]) -> None:
    """After the last steps, of the metrics `empty`, had no example: a run with nothing left to learn is done, any other fails.

    Nothing is left where all groups were whole, and their rollouts alike: the same command would find them so again.

    Raises:
        TrainingError: on rank 0 it has the reasons.
    """
    state, rank = run.state, run.settings.run.rank
    dropped = merge(
        {name.removeprefix("dropped/"): n for name, n in step.items() if name.startswith("dropped/") and n}
        for step in empty
    )
    lost = merge(map(lost_groups, empty))
    # A single rewrite that failed says nothing of a rewriter; one that refuses all of a step's is an outage.
    whole = all(is_representative(step, run.settings.run.min_usable_share) for step in empty)
    outage = any(step.get("groups") and step.get(FAILED_REWRITES) == step.get("groups") for step in empty)
    alike = dropped != {} and whole and not outage and set(dropped) <= ALL_ALIKE
    state.learnt = alike and state.iteration > MAX_EMPTY_STEPS
    ways = "take other tasks, a higher --rollout-temperature or more --num-rollouts"
    if state.learnt:
        if rank == 0:
            say(
                f"nothing left to learn: in {MAX_EMPTY_STEPS} steps in a row all rollouts of a task were alike, they always "
                f"succeed or never do; the run ends with step {state.iteration}. For more start a run from its weights: {ways}"
            )
        return
    trained = state.trained[0]
    if trained:
        run.save_what_was_trained()
    told = f"no group was usable in {MAX_EMPTY_STEPS} steps in a row; reasons: {dropped | lost}. "
    if alike:
        told += f"All rollouts of a task score the same from the first step on, they always succeed or never do: {ways}"
    else:
        told += f"Step {trained} is saved: once" if trained else "Once"
        told += " judge, rewriter and engines answer, the same command tries their tasks again"
    raise TrainingError(told if rank == 0 else 1)


def no_finite_step(run: Run) -> str:
    """Why the run ends after steps without an update."""
    state = run.state
    passed = state.non_finite_steps == MAX_NON_FINITE_STEPS  # see `run_steps`
    goes_on = "continues behind their batches" if passed else "tries those since then again"
    return (
        f"{state.non_finite_steps} steps in a row, up to step {state.iteration}, had no finite loss or gradient. Checkpoint "
        f"{state.last_saved} has the weights from before them, and the same command {goes_on}: "
        "lower --lr or --dpo-beta, raise --adam-eps, or take --bf16 for --fp16; to go back further write an earlier step into "
        f"{run.settings.run.save}/{TRACKER}"
    )


def stop_early(run: Run, stop: StopSignal) -> bool:
    """Save the last finished step; returns False, or raises TrainingError where a run's own trouble asked for the stop."""
    end_in_trouble(run, stop)
    run.save_what_was_trained()
    if run.settings.run.rank == 0:
        say(f"stopped on request: step {run.state.iteration} is saved, the same command continues")
    return False


def timed(name: str, *actions: Callable[[], Metrics | None]) -> Metrics:
    """Run `actions`; their metrics, and how long they took, in seconds, under `name`."""
    started = time.monotonic()
    metrics: Metrics = {}
    for action in actions:
        metrics |= action() or {}
    return metrics | {name: time.monotonic() - started}


if __name__ == "__mp_main__":  # a judge function's process, which imports this module too
    kill_with_parent()
if __name__ == "__main__":
    main()
