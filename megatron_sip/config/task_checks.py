"""Which flags labelled tasks need, and which mean nothing with them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_sip.config.held_out import DEFAULT_SUITES, EVAL_RECORDS, RATED_SETS, SUITES, prompt_sets_of, suites_of
from megatron_sip.config.needs import candidates_of, criteria_of, has_servers
from megatron_sip.judge.settings import LABELLED_CRITERIA, asks_server, known_criteria, split_criterion

_OF_DOCUMENTS = {"task_mode": "random", "text_field": "text", "prepend_bos": "auto", "subset": None}
"""Flags that say how documents are read and cut, with their defaults."""


def check_tasks(args: argparse.Namespace) -> Iterator[str]:
    """What --tasks and the other flags need of each other."""
    names = [split_criterion(item)[0] for item in criteria_of(args)]
    for name in names:
        if (kind := LABELLED_CRITERIA.get(name, args.tasks)) != args.tasks:
            yield f"--criteria {name}: it scores --tasks {kind}, these are {args.tasks}"
    yield from _check_validation(args)
    if args.tasks == "documents":
        if args.max_prompt_length is not None:
            yield (
                "--max-prompt-length: for labelled tasks; the prefix of a document has at most --seq-length minus "
                "--suffix-length tokens"
            )
        return
    own = [name for name, kind in LABELLED_CRITERIA.items() if kind == args.tasks]
    for name in names:
        if name in set(known_criteria()) - set(LABELLED_CRITERIA) or (name.endswith(".txt") and asks_server(name)):
            yield f"--criteria {name}: it scores continuations of documents; --tasks {args.tasks} have {' and '.join(own)}"
    yield from _check_objective(args)
    yield from _check_lengths(args)
    if args.win_rate_prompts:
        yield f"--win-rate-prompts: it compares continuations of documents; with --tasks {args.tasks} leave it at 0"
    for name, default in _OF_DOCUMENTS.items():
        if getattr(args, name) != default and not (name == "prepend_bos" and args.tasks == "thoughts"):
            yield f"--{name.replace('_', '-')}: it is for --tasks documents; remove it"


def _check_validation(args: argparse.Namespace) -> Iterator[str]:
    if args.eval_interval is None:
        given = [name for name in ("eval_suites", "eval_by_training_judge") if getattr(args, name)]
        if args.eval_records != EVAL_RECORDS:
            given.append("eval_records")
        for name in given:
            yield f"--{name.replace('_', '-')}: of no effect without --eval-interval; give that too"
        return
    yield from _check_suites(args)
    if args.eval_interval < 1 or args.eval_records < 1:
        yield f"--eval-interval {args.eval_interval}, --eval-records {args.eval_records}: both must be at least 1"
    if args.replay_groups is not None:
        yield "--eval-interval: --replay-groups asks no engine, and validation needs answers; remove one of them"


def _check_suites(args: argparse.Namespace) -> Iterator[str]:
    if args.tasks != "documents":
        if args.eval_suites:
            yield f"--eval-suites: of documents; --tasks {args.tasks} are measured by their own answers; remove it"
        return
    suites, sets = args.eval_suites or DEFAULT_SUITES, prompt_sets_of(args)
    for name in suites:
        if name not in SUITES and "=" not in name:
            yield f"--eval-suites {name}: known are {', '.join(SUITES)}, and NAME=FILE for a set of prompts"
    if len(sets) < sum("=" in item for item in suites):
        yield f"--eval-suites {' '.join(suites)}: a set is named twice"
    for name, path in sets.items():
        if name not in RATED_SETS:
            yield f"--eval-suites {name}={path}: sets that are rated are {', '.join(RATED_SETS)}"
        elif not path.is_file():
            yield f"--eval-suites {name}={path}: no such file; `megatron-sip-evaluate sets` says where it is published"
    if args.task_mode == "whole" and suites_of(args):
        yield "--eval-interval: it measures prefixes and their suffixes, of which --task-mode whole cuts none; use random"
    if "win-rate" not in suites and not sets:
        if args.eval_by_training_judge:
            yield "--eval-by-training-judge: of no effect without win-rate or a set among --eval-suites; remove it"
    elif args.eval_by_training_judge == has_servers(args, "eval_judge"):
        yield (
            f"--eval-suites {' '.join(suites)}: a judge that the policy is trained to please says little; give another one by "
            "--eval-judge-url, or say --eval-by-training-judge (one of the two)"
        )


def _check_objective(args: argparse.Namespace) -> Iterator[str]:
    if args.objective == "sft" or args.dpo_pair is not None:
        flag = "--dpo-pair" if args.dpo_pair is not None else "--objective sft"
        yield f"{flag}: labelled tasks are learnt from scored rollouts alone: --objective grpo, dpo or rf-nll"
    elif candidates_of(args) != ["rollout"]:
        yield f"--candidates {' '.join(candidates_of(args))}: {args.tasks} have rollouts alone as candidates; remove it"


def _check_lengths(args: argparse.Namespace) -> Iterator[str]:
    if args.seq_length is None:  # `missing_flags` says so
        return
    room = args.seq_length - args.suffix_length
    if args.max_prompt_length is not None and not 1 <= args.max_prompt_length <= room:
        yield (
            f"--max-prompt-length {args.max_prompt_length}: with an answer of --suffix-length {args.suffix_length} it must fit "
            f"into --seq-length {args.seq_length}: at least 1, at most {room}"
        )
    batch = getattr(args, "global_batch_size", None)
    if args.tasks == "judgements" and batch is not None and batch % 2:
        yield f"--global-batch-size {batch}: judgements come in pairs, both orders of the same texts: an even number is needed"
