"""What the objective needs of candidates, rows and its own flags, and which flags mean nothing to it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_sip.config.candidate_checks import control_room
from megatron_sip.config.flags import OBJECTIVE_FLAGS, TASK_FLAGS
from megatron_sip.config.needs import Needs, branches_in_a_row, candidate_count, criteria_of
from megatron_sip.judge.settings import LIKELIHOOD

GRPO_FLAGS = (
    *(flag for flag in OBJECTIVE_FLAGS if flag.startswith("--grpo-")),
    *("--truncated-answers", "--mismatch-correction", "--branches-per-row"),
)
DPO_FLAGS = ("--dpo-beta", "--dpo-nll-coef", "--dpo-label-smoothing", "--dpo-loss")
REFERENCE_FLAGS = ("--ref-update-interval", "--ref-offload")


def check_row_length(args: argparse.Namespace) -> Iterator[str]:
    """Fills --row-length, and notes whether it was given: a GPU's default may be longer (see `planning.rows`)."""
    if args.seq_length is None:
        return
    branches = branches_in_a_row(args.objective, args.num_rollouts, args.branches_per_row)
    needed = args.seq_length + (branches - 1) * args.suffix_length + control_room(args)
    args.row_length_given = args.row_length is not None
    if args.row_length is None:
        args.row_length = needed
    if args.row_length < needed:
        shorter = ", or let --branches-per-row split a group" if args.objective == "grpo" and branches > 1 else ""
        yield (
            f"--row-length {args.row_length} does not hold one full group: it must be at least {needed} "
            f"(--seq-length, --suffix-length more for each of {branches} branches but the first, and the control text's bytes "
            f"with --control-token){shorter}"
        )


def check_objective(args: argparse.Namespace) -> Iterator[str]:
    """What objective, candidates and reference need of each other."""
    kinds = Needs.from_args(args).kinds
    if "rollout" in kinds and args.num_rollouts < 1:
        yield f"--num-rollouts {args.num_rollouts}: must be at least 1 when rollout is a candidate"
    count = candidate_count(kinds, args.num_rollouts)
    if args.objective == "dpo" and count < 2:
        yield "--objective dpo compares two candidates: add a kind to --candidates or raise --num-rollouts"
    if args.objective == "rf-nll" and kinds == ("rollout",) and count < 2:
        yield (
            "--objective rf-nll teaches a rollout only if it wins against another candidate: add suffix or rewrite to "
            "--candidates, or raise --num-rollouts"
        )
    if args.logit_chunk_columns < 0:
        yield f"--logit-chunk-columns {args.logit_chunk_columns}: must be 0 (all at once) or more"
    if not 0 <= args.min_usable_share <= 1:
        yield f"--min-usable-share {args.min_usable_share}: a share, from 0 to 1"
    if args.objective != "dpo":
        yield from _meaningless(args, DPO_FLAGS, "for --objective dpo only")
    if args.objective != "sft":
        yield from _meaningless(args, ("--sft-target",), "for --objective sft only")
    if args.objective == "grpo":
        yield from _check_grpo(args)
    else:
        yield from _meaningless(args, GRPO_FLAGS, "for --objective grpo only")
    if args.objective != "dpo" and not (args.objective == "grpo" and args.grpo_kl_coef > 0):
        yield from _meaningless(args, REFERENCE_FLAGS, "only dpo has a reference, and grpo with --grpo-kl-coef above 0")


def _check_grpo(args: argparse.Namespace) -> Iterator[str]:
    if args.num_rollouts < 2:
        yield f"--num-rollouts {args.num_rollouts}: --objective grpo compares a group's rollouts, it needs at least 2"
    if args.max_staleness and args.mismatch_correction == "none":
        yield (
            "--mismatch-correction none with --max-staleness 1: rollouts are of older weights, which nothing would correct; "
            "take truncate or mask"
        )
    if args.rollout_temperature == 0:
        yield "--rollout-temperature 0: greedy rollouts of a prefix are all the same; --objective grpo needs it above 0"
    if args.grpo_oversample < 1:
        yield f"--grpo-oversample {args.grpo_oversample}: must be at least 1, the round that every step asks for"
    if args.branches_per_row is not None and args.branches_per_row < 1:
        yield f"--branches-per-row {args.branches_per_row}: must be at least 1"
    if args.truncated_answers == "zero" and [given.split("=")[0] for given in criteria_of(args)] == [LIKELIHOOD]:
        yield "--truncated-answers zero: likelihoods are below 0, so that 0 would be the best score; use mask or score"


def _meaningless(args: argparse.Namespace, flags: tuple[str, ...], why: str) -> Iterator[str]:
    """Those of `flags` that were given another value than their default."""
    for flag in flags:
        settings, _ = (OBJECTIVE_FLAGS | TASK_FLAGS)[flag]
        default = settings.get("default", False if settings.get("action") == "store_true" else None)
        if getattr(args, flag.removeprefix("--").replace("-", "_")) != default:
            yield f"{flag}: {why}; remove it"
