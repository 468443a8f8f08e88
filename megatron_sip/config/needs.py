"""Which candidates and servers a run needs, from its flags."""

from __future__ import annotations

import argparse

from megatron_sip.config.settings import has_servers, rewriter_role, schedule_settings
from megatron_sip.records import CANDIDATE_KINDS


def uses_judge(args: argparse.Namespace) -> bool:
    """Whether selection needs scores: not for SFT, nor for DPO with roles fixed by kind."""
    return args.objective != "sft" and args.dpo_pair is None


def candidate_kinds(args: argparse.Namespace) -> tuple[str, ...]:
    """The kinds of candidates that the run needs, in canonical order."""
    if args.objective == "sft":
        wanted = {args.sft_target}
    elif args.dpo_pair is not None:
        wanted = set(args.dpo_pair)
    else:
        wanted = set(args.candidates)
    return tuple(kind for kind in CANDIDATE_KINDS if kind in wanted)


def needs_judge(args: argparse.Namespace) -> bool:
    """Whether the teacher scores anything in this run, the held-out comparison included."""
    compares = args.win_rate_prompts > 0 and not needs_eval_judge(args)
    return (uses_judge(args) and args.replay_groups is None) or compares


def needs_teacher(args: argparse.Namespace) -> bool:
    """Whether the teacher is asked anything."""
    return needs_judge(args) or (needs_rewriter(args) and rewriter_role(args) == "teacher")


def needs_rewriter(args: argparse.Namespace) -> bool:
    """Whether suffixes are rewritten."""
    return args.replay_groups is None and "rewrite" in candidate_kinds(args)


def needs_engines(args: argparse.Namespace) -> bool:
    """Whether the policy is sampled."""
    makes_groups = args.replay_groups is None and "rollout" in candidate_kinds(args)
    return makes_groups or args.win_rate_prompts > 0


def local_servers(args: argparse.Namespace) -> int:
    """How many SGLang servers this run starts."""
    engines = args.rollout_local if needs_engines(args) else 0
    teacher = args.teacher_model is not None and needs_teacher(args)
    rewriter = args.rewriter_model is not None and needs_rewriter(args)
    return engines + int(teacher) + int(rewriter)


def contender_count(args: argparse.Namespace, with_rollouts: bool = True) -> int:
    """Candidates of one prompt that compete: all but a rollout drawn as the judge's pivot."""
    rollouts = args.num_rollouts if with_rollouts else 0
    count = sum(rollouts if kind == "rollout" else 1 for kind in candidate_kinds(args))
    schedule = schedule_settings(args)
    drawn = uses_judge(args) and schedule.pivot_apart and schedule.pivot == "rollout" and rollouts > 0
    return count - int(drawn)


def needs_eval_judge(args: argparse.Namespace) -> bool:
    """Whether the held-out comparison has a judge of its own."""
    return args.win_rate_prompts > 0 and has_servers(args, "eval_judge")
