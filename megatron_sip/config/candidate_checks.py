"""Which candidates are left at each step, whole documents and control texts: what these flags need of the others."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megatron_sip.config.needs import Needs, candidate_count
from megatron_sip.config.settings import control_settings, kind_steps
from megatron_sip.records import CandidateKind


def check_candidates(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong, with the flag and what would be right."""
    yield from _check_ends(args)
    yield from _check_phases(args)
    if args.task_mode == "whole":
        if args.objective != "sft" or args.sft_target != "document":
            yield "--task-mode whole cuts no suffixes: it is for --objective sft --sft-target document; use random or stream"
        if args.win_rate_prompts:
            yield "--win-rate-prompts compares continuations of prefixes, of which --task-mode whole cuts none; use random"


def _check_ends(args: argparse.Namespace) -> Iterator[str]:
    kinds = Needs.from_args(args).kinds
    for kind, end in (("suffix", args.suffix_end_step), ("rewrite", args.rewrite_end_step)):
        if end is None:
            continue
        if kind not in kinds:
            yield f"--{kind}-end-step {end}: {kind} is no candidate of this run; remove it"
        elif end < 1:
            yield f"--{kind}-end-step {end}: must be at least 1; to do without it from the start, it is no candidate"
        elif kind == "suffix" and args.judge_pivot_competes and args.judge_pivot == "suffix":
            yield f"--suffix-end-step {end}: the suffix is the pivot of --judge-pivot-competes; remove one of the two"


def _check_phases(args: argparse.Namespace) -> Iterator[str]:
    """Whether enough candidates are left in each phase, where the flags make any."""
    kinds, steps = Needs.from_args(args).kinds, kind_steps(args)
    for step in steps.phases():
        left = steps.at(kinds, step)
        if left == kinds or enough(args, left):
            continue
        gone = [kind for kind in kinds if kind not in left]
        flags = [
            f"--rollout-start-step {args.rollout_start_step}" if kind == "rollout" else f"--{kind}-end-step {end}"
            for kind, end in (("rollout", 0), ("suffix", args.suffix_end_step), ("rewrite", args.rewrite_end_step))
            if kind in gone
        ]
        yield (
            f"{' with '.join(flags)} leaves {candidate_count(left, args.num_rollouts)} candidate(s) at step {step}, too few "
            f"for {_objective(args)}: add a kind to --candidates, or move the step"
        )


def _objective(args: argparse.Namespace) -> str:
    """The objective with what it fixes."""
    fixed = args.sft_target if args.objective == "sft" else " ".join(args.dpo_pair or ())
    flag = "--sft-target" if args.objective == "sft" else "--dpo-pair"
    return f"--objective {args.objective}" + (f" {flag} {fixed}" if fixed else "")


def enough(args: argparse.Namespace, kinds: Sequence[CandidateKind]) -> bool:
    """Whether the objective can learn from candidates of these kinds alone."""
    if args.objective == "sft" or args.dpo_pair is not None:
        return set(kinds) == set(Needs.from_args(args).kinds)
    count = candidate_count(kinds, args.num_rollouts)
    if args.objective == "rf-nll":  # a lone rollout teaches nothing
        return count >= (2 if tuple(kinds) == ("rollout",) else 1)
    return count >= 2 and (args.objective == "dpo" or "rollout" in kinds)


def control_room(args: argparse.Namespace) -> int:
    """Tokens that a row needs for a control text; 0 where there is none, or a mistake that is told elsewhere."""
    try:
        control = control_settings(args)
    except ValueError:
        return 0
    return 0 if control is None else control.room
