"""Which flags cannot work together, and which of Megatron's cannot be honoured; one setting alone is checked where it lives."""

from __future__ import annotations

import argparse
import contextlib
import linecache
import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.config.candidate_checks import check_candidates
from megatron_sip.config.flags import ROLES
from megatron_sip.config.held_out import held_out_sampling
from megatron_sip.config.needs import Needs, contender_count
from megatron_sip.config.number_checks import check_numbers
from megatron_sip.config.objective_checks import check_objective, check_row_length
from megatron_sip.config.settings import (
    URL_ROLES,
    local_server_settings,
    objective_settings,
    rollout_sampling,
    selection_settings,
    task_settings,
)
from megatron_sip.config.task_checks import check_tasks
from megatron_sip.config.teacher_settings import judge_settings, rating_settings, replicas, rewriter_settings
from megatron_sip.data.documents import parse_split
from megatron_sip.errors import ArgumentError, DataError
from megatron_sip.judge.schedules import least_budget
from megatron_sip.judge.settings import JudgeSettings, SettingsError, is_pairwise
from megatron_sip.serving.http_reply import key_from_environment, shown_url, url_mistake

REQUIRED = {
    "data_path": "jsonl, parquet or .bin/.idx files, optionally with weights",
    "seq_length": "the most tokens of a prefix and its suffix together",
    "train_iters": "the number of steps",
    "lr": "the learning rate",
    "save": "the folder for checkpoints (and for metrics, unless --run-dir is given)",
}
"""Flags without a default, by their name among the arguments."""
EVAL_ITERS = (None, 0, 100)
"""Megatron's default of --eval-iters, and what switches its evaluation off."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what Megatron or transformers raise about flags and files into an ArgumentError that starts with `what`.

    Many of Megatron's checks are assertions without a message: then it quotes the line that failed.
    """
    try:
        yield
    except (AssertionError, ValueError, TypeError, RuntimeError, OSError) as error:
        raise ArgumentError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if str(error) and not isinstance(error, TypeError):  # one about None says nothing without its line
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first, last = frame.lineno or 0, frame.end_lineno or frame.lineno or 0
    code = " ".join(linecache.getline(frame.filename, number).strip() for number in range(first, last + 1))
    failed = f"`{code}` fails ({frame.filename}:{first})"
    return f"{error}: {failed}" if str(error) else failed


def refuse(problems: Iterable[str]) -> None:
    """Raise one ArgumentError that lists all `problems`, each of which names its flag and what would be right."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        raise ArgumentError(found[0])
    if found:
        raise ArgumentError("\n  - ".join([f"{len(found)} of the flags cannot be used:", *found]))


def check_required(args: argparse.Namespace) -> None:
    """Refuse what must be known before Megatron fills its own defaults and prints all arguments. Raises ArgumentError."""
    refuse([*missing_flags(args), *_check_urls(args)])


def missing_flags(args: argparse.Namespace) -> Iterator[str]:
    """What must be given, and what Megatron must not fill by itself."""
    if getattr(args, "use_checkpoint_args", False):
        yield "--use-checkpoint-args: the architecture comes from the HF config (--hf-config); remove it"
    if getattr(args, "async_save", False):
        yield "--async-save: a step is saved, with its reference, before the next one begins; remove it"
    for name, meaning in REQUIRED.items():
        if getattr(args, name) is None:
            yield f"--{name.replace('_', '-')} is required: {meaning}"


def flag_of(role: str, name: str) -> str:
    return f"--{role}-{name}".replace("_", "-")


def problems_of_ours(args: argparse.Namespace) -> list[str]:
    """What is wrong with our own flags, and with those of Megatron's that `early_checks` reads as well."""
    checks = (
        check_numbers,
        _check_settings,
        check_row_length,
        check_objective,
        check_candidates,
        check_tasks,
        _check_urls,
        _check_servers,
        _check_judges,
        _check_data,
        _check_times,
    )
    return _problems(args, *checks)


def _problems(args: argparse.Namespace, *checks: Callable[[argparse.Namespace], Iterator[str]]) -> list[str]:
    return [problem for check in checks for problem in check(args)]


def validate(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before hours are spent, and fill the defaults that depend on other flags.

    Raises:
        ArgumentError: names the flag and what would be right.
    """
    refuse(
        [
            *problems_of_ours(args),
            *_problems(args, _check_batch, _check_schedule, _check_megatron, _check_checkpoints, _check_local_servers),
        ]
    )
    begin_warm_up_above_zero(args)
    if args.run_dir is None:
        args.run_dir = args.save
    args.load = args.save  # the same command again continues the run
    if args.weight_sync_dir is None:
        args.weight_sync_dir = str(Path(args.run_dir) / "weights")


def _check_settings(args: argparse.Namespace) -> Iterator[str]:
    """What each room's settings find wrong with themselves; they name the flag."""
    builders: list[Callable[[argparse.Namespace], object]] = [objective_settings, selection_settings]
    if args.seq_length is not None:  # `missing_flags` says so
        builders += [task_settings]
    if args.suffix_length >= 1:
        builders += [rollout_sampling, held_out_sampling]
    for build in builders:
        try:
            build(args)
        except ValueError as error:
            yield str(error)


def _check_servers(args: argparse.Namespace) -> Iterator[str]:
    if args.local_server_memory is not None and not 0 < args.local_server_memory < 1:
        yield f"--local-server-memory {args.local_server_memory}: a share of a GPU's memory is between 0 and 1"
    if args.rollout_url and args.rollout_local:
        yield "--rollout-url and --rollout-local exclude each other: use one"
    if args.colocate and not args.rollout_local:
        yield (
            "--colocate releases the memory of engines that the run starts itself: give --rollout-local N; those of "
            "--rollout-url may serve others"
        )
    if args.colocate and args.max_staleness:
        yield "--colocate and --max-staleness 1 exclude each other: engines would sample while the trainer has their memory"
    if args.teacher_replicas < 1:
        yield f"--teacher-replicas {args.teacher_replicas}: at least 1 server of --teacher-model"
    if args.teacher_replicas > 1 and not args.teacher_model:
        yield "--teacher-replicas is of the servers that --teacher-model starts; of others give all their --teacher-url"
    for role in ("teacher", "rewriter"):
        url, model = getattr(args, f"{role}_url"), getattr(args, f"{role}_model")
        if url and model:
            yield f"--{role}-url and --{role}-model exclude each other: use one"
    for role in ROLES:
        if getattr(args, f"{role}_api") == "openai" and not getattr(args, f"{role}_name"):
            yield f"{flag_of(role, 'api')} openai needs {flag_of(role, 'name')}, the model name that the server expects"
    if not args.dry_run:  # which asks no server and reads no file
        yield from _missing_servers(args)


def _missing_servers(args: argparse.Namespace) -> Iterator[str]:
    """Who is asked, and what is read, but is not named or not there."""
    needs = Needs.from_args(args)
    if args.replay_groups and not Path(args.replay_groups).is_dir():
        yield f"--replay-groups {args.replay_groups}: no such folder; --save-groups of a run makes one"
    if needs.engines and not args.rollout_url and not args.rollout_local:
        yield "rollouts need engines: give --rollout-url URL ..., or --rollout-local N to start them here"
    if needs.teacher and not args.teacher_url and not args.teacher_model:
        yield "the judge or rewriter needs a server: give --teacher-url URL ..., or --teacher-model DIR"
    for role in ("teacher", "rewriter"):
        model = getattr(args, f"{role}_model")
        if model and not (Path(model) / "config.json").is_file():
            yield f"--{role}-model {model}: no config.json there; give an HF model folder"
    for role in URL_ROLES:
        if variable := getattr(args, f"{role}_key_variable"):
            try:
                key_from_environment(variable)
            except ValueError as error:
                yield f"{flag_of(role, 'key-variable')}: {error}"


def _check_urls(args: argparse.Namespace) -> Iterator[str]:
    """A URL is shown without what may be its password."""
    for role in URL_ROLES:
        for url in getattr(args, f"{role}_url") or []:
            if mistake := url_mistake(url):
                hint = f": give the key through {flag_of(role, 'key-variable')}" if "@" in url else ""
                yield f"{flag_of(role, 'url')} {shown_url(url)}: {mistake}{hint}"


def _check_judges(args: argparse.Namespace) -> Iterator[str]:
    """What criteria, schedule, verdicts and endpoints need of each other; the servers themselves may still be starting."""
    needs = Needs.from_args(args)
    asked: list[tuple[bool, str, Callable[[argparse.Namespace], object]]] = [
        (needs.judge, "teacher", judge_settings),
        (needs.eval_judge, "eval_judge", partial(judge_settings, role="eval_judge")),
        (needs.rates, needs.rater_role, partial(rating_settings, role=needs.rater_role)),
        (needs.rewriter, needs.rewriter_role, rewriter_settings),
    ]
    for needed, role, build in asked:
        if not needed or any(map(url_mistake, getattr(args, f"{role}_url") or [])):
            continue
        try:
            made = build(args)
        except SettingsError as error:
            yield str(error)
        else:
            if role == "teacher" and isinstance(made, JudgeSettings):
                yield from _schedule_mistakes(args, made)


def _schedule_mistakes(args: argparse.Namespace, settings: JudgeSettings) -> Iterator[str]:
    """What the schedule needs of the candidates, where pairs of them are judged."""
    needs = Needs.from_args(args)
    if not needs.scores or not any(map(is_pairwise, settings.criteria)):
        return
    schedule, kinds = settings.schedule, needs.kinds
    if schedule.pivot_apart and schedule.pivot == "suffix" and "suffix" in kinds:
        yield (
            "--judge-schedule pivot: the suffix is compared with the candidates and is none of them: leave it out of "
            "--candidates, or give --judge-pivot-competes"
        )
    if (
        schedule.name == "pivot"
        and schedule.pivot not in kinds
        and not (schedule.pivot_apart and schedule.pivot == "suffix")
    ):
        yield f"--judge-pivot {schedule.pivot}: there is none to be the pivot; add {schedule.pivot} to --candidates"
    count = contender_count(kinds, args.num_rollouts, schedule)
    if args.objective in ("dpo", "grpo") and schedule.pivot_apart and count < 2:
        yield "--judge-schedule pivot leaves fewer than two candidates beside the pivot: raise --num-rollouts"
    if schedule.name == "two_ended_bt" and schedule.budget < least_budget(count):
        yield (
            f"--judge-budget {schedule.budget}: two_ended_bt needs at least {least_budget(count)} pairs to link {count} "
            "candidates, and would otherwise compare none; raise it"
        )


def _check_data(args: argparse.Namespace) -> Iterator[str]:
    try:
        if args.split is not None:
            parse_split(args.split)  # the corpus is split only after hours of tokenising
    except DataError as error:
        yield str(error)


def _check_times(args: argparse.Namespace) -> Iterator[str]:
    if not 0 <= args.step_timeout < math.inf:
        yield f"--step-timeout {args.step_timeout}: seconds are needed, 0 for never"
    engines = len(args.rollout_url or ()) or args.rollout_local or 1
    least = engines * replicas(args)
    if args.rollout_concurrency is not None and args.rollout_concurrency < least:
        each = f", one for each of {engines} engines and {replicas(args)} data-parallel replicas" if least > 1 else ""
        yield f"--rollout-concurrency {args.rollout_concurrency}: at least {least} is needed{each}"


def _check_batch(args: argparse.Namespace) -> Iterator[str]:
    if args.global_batch_size % args.data_parallel_size:
        yield (
            f"--global-batch-size {args.global_batch_size} prompts do not divide among {args.data_parallel_size} "
            "data-parallel replicas"
        )


def _check_schedule(args: argparse.Namespace) -> Iterator[str]:
    """What Megatron's schedule only asserts once the model is built."""
    flag, decay = _decay(args)
    if decay < 1:
        yield f"{flag} {decay} must be at least 1"
    elif (args.lr_warmup_iters or 0) >= decay:
        yield f"--lr-warmup-iters {args.lr_warmup_iters} must be below {flag} {decay}"
    if args.lr_warmup_init > args.lr:
        yield f"--lr-warmup-init {args.lr_warmup_init} must not be above --lr {args.lr}"
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        yield "--lr-decay-style WSD needs --lr-wsd-decay-iters, the steps of its decay at the end"


def _decay(args: argparse.Namespace) -> tuple[str, int]:
    """The flag that says at which step the learning rate has decayed, and that step."""
    if args.lr_decay_iters is None:
        return "--train-iters", args.train_iters
    return "--lr-decay-iters", args.lr_decay_iters


def begin_warm_up_above_zero(args: argparse.Namespace) -> None:
    """Let the first step have the rate of one step of warm-up: at Megatron's 0 its rollouts and judgements are for nothing."""
    steps = args.lr_warmup_iters if args.lr_warmup_fraction is None else args.lr_warmup_fraction * _decay(args)[1]
    if steps and args.lr_warmup_init == 0:
        args.lr_warmup_init = args.lr / max(steps, 1)


def _check_megatron(args: argparse.Namespace) -> Iterator[str]:
    """Flags of Megatron's that this trainer cannot honour."""
    refused = [
        (
            args.context_parallel_size != 1,
            "--context-parallel-size: packed prefix trees are not split along the sequence; use 1",
        ),
        (
            args.micro_batch_size != 1,
            "--micro-batch-size must be 1: a packed row is a micro-batch; --row-length makes it larger",
        ),
        (
            args.overlap_param_gather,
            "--overlap-param-gather: weights are pushed and saved right after the step; remove it",
        ),
        (
            args.virtual_pipeline_model_parallel_size is not None,
            "--num-layers-per-virtual-pipeline-stage: it needs a fixed number of micro-batches, and ours varies; remove it",
        ),
        (
            args.use_checkpoint_opt_param_scheduler,
            "--use-checkpoint-opt-param-scheduler: a run that continues takes the schedule of its flags; remove it",
        ),
        (
            Needs.from_args(args).engines and args.rollout_timeout >= 60 * args.distributed_timeout_minutes,
            f"--rollout-timeout {args.rollout_timeout:g}: an engine that hangs must be given up before the ranks give each "
            f"other up, --distributed-timeout-minutes {args.distributed_timeout_minutes}: lower the one or raise the other",
        ),
        (args.rampup_batch_size is not None, "--rampup-batch-size: the number of prompts a step is fixed; remove it"),
        (
            args.exit_interval is not None or args.exit_duration_in_mins is not None,
            "--exit-interval and --exit-duration-in-mins: send SIGTERM instead, the run saves and exits 0",
        ),
        (
            args.eval_iters not in EVAL_ITERS,
            "--eval-iters: there are no validation batches; remove it. --eval-interval measures held-out text or records, "
            "--eval-records of them, and --win-rate-prompts compares the trained policy with the initial one",
        ),
        (args.clip_grad <= 0, "--clip-grad 0 switches the check for NaN gradients off too; give a large value instead"),
    ]
    for is_refused, message in refused:
        if is_refused:
            yield message


def _check_checkpoints(args: argparse.Namespace) -> Iterator[str]:
    """Flags of Megatron's by which a run could not be continued, or not as it was."""
    refused = [
        (
            args.load not in (None, args.save),
            f"--load {args.load}: a run continues from its own --save folder ({args.save}), where its reference is; to "
            "start from other weights give --pretrained-checkpoint",
        ),
        (
            args.finetune,
            f"--finetune would start at step 0 and discard what --save {args.save} holds; to start from other weights give "
            "--pretrained-checkpoint and a new --save folder",
        ),
        (
            args.ckpt_step is not None or args.override_ckpt_iteration is not None,
            "--ckpt-step and --override-ckpt-iteration: a run continues at its latest checkpoint; to go back write the "
            f"step into {args.save}/{TRACKER}, later checkpoints are then moved aside",
        ),
        (
            args.ckpt_format != "torch_dist",
            f"--ckpt-format {args.ckpt_format}: a run continues from torch_dist checkpoints, which it can check; remove it",
        ),
        (
            args.no_save_optim or args.no_load_optim or args.skip_train,
            "--no-save-optim, --no-load-optim, --skip-train: a run that continues needs the optimizer's moments; remove it",
        ),
    ]
    for is_refused, message in refused:
        if is_refused:
            yield message


def _check_local_servers(args: argparse.Namespace) -> Iterator[str]:
    import torch

    if args.dry_run:
        return
    servers = local_server_settings(args).count
    if not servers:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    if here < args.world_size:
        yield (
            "--rollout-local, --teacher-model and --rewriter-model start servers that only this node reaches: on several "
            "nodes start them apart and give --rollout-url and --teacher-url (examples/train_continual.sbatch)"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    shared = args.local_server_memory is not None or args.colocate
    if not shared and gpus is not None and gpus < here + servers:
        yield (
            f"--rollout-local, --teacher-model, --rewriter-model: {here} trainer processes and {servers} servers need a GPU "
            f"each, this node has {gpus}: start fewer processes, let them share GPUs "
            "(--colocate, --local-server-memory), or serve elsewhere and give --rollout-url and --teacher-url"
        )
