"""Flags of judge and rewriter, and the settings that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sip.config.server_flags import (
    Flags,
    Role,
    add_flags,
    add_server_flags,
    endpoints_of,
    rewriter_role,
    tokenizer_of,
)
from megatron_sip.judge.rewriter import RewriterSettings
from megatron_sip.judge.settings import (
    SCHEDULE_NAMES,
    ClientSettings,
    JudgeSettings,
    ScheduleSettings,
    SettingsError,
    parse_criteria,
    parse_verdicts,
)

FLAG_OF_SETTING = {
    "requests_per_s": "--teacher-requests-per-second",
    "call_timeout_s": "--teacher-timeout",
    "reasoning_tokens": "--teacher-reasoning-tokens",
    "context_tokens": "--teacher-context",
    "answer_prefix": "--teacher-answer-prefix",
    "prefill": "--teacher-prefill",
    "kind sglang": "--teacher-api sglang",
    "rewrite temperature": "--rewrite-temperature",
    "schedule degree": "--judge-degree",
    "pivot_competes": "--judge-pivot-competes",
    "schedule budget": "--judge-budget",
    "prefix_chars": "--judge-prefix-chars",
    "max_tokens": "--judge-max-tokens",
    "audit_rate": "--judge-audit-rate",
    "quorum": "--judge-quorum",
    "votes": "--judge-votes",
    "deadline_s": "--judge-deadline",
    "concurrency": "--judge-concurrency",
    "temperature": "--judge-temperature",
    "top_p": "--judge-top-p",
    "verdict": "--judge-verdict",
    "criteri": "--criteria",
}
"""What a SettingsError calls a setting -> the flag; the first that occurs in a message is meant."""


TEACHER_FLAGS: Flags = {
    "--rewrite-temperature": ({"type": float, "default": 0.0}, "Sampling of the rewriter; 0 is greedy."),
    "--teacher-timeout": (
        {"type": float, "default": 120.0, "metavar": "SECONDS"},
        "For one attempt of one teacher call.",
    ),
    "--judge-prefix-chars": (
        {"type": int, "default": 16_000, "metavar": "CHARS"},
        "Of a longer prefix, judge and rewriter are shown the end only.",
    ),
}
JUDGE_FLAGS: Flags = {
    "--criteria": (
        {"nargs": "+", "default": ["likelihood=1"], "metavar": "NAME=WEIGHT"},
        "What the judge scores, summed with weights: quality, safety, factuality, likelihood, or the path of a prompt "
        "file of your own (*.txt).",
    ),
    "--judge-verdict": (
        {"nargs": "+", "default": ["soft"], "metavar": "MODE"},
        "hard: the judge writes, and --judge-votes verdicts are read. soft: the probability of its verdict token. "
        "One word for all criteria, NAME=MODE for one: soft safety=hard.",
    ),
    "--judge-votes": ({"type": int, "default": 5}, "Verdicts asked per judgement (paper: 5)."),
    "--judge-temperature": ({"type": float, "default": 1.0}, "Sampling of verdicts (paper: 1.0)."),
    "--judge-top-p": (
        {"type": float, "default": 0.6},
        "Nucleus of the verdicts' sampling (paper: 0.6). An option with that much probability gets all hard votes.",
    ),
    "--judge-max-tokens": (
        {"type": int, "default": 512, "metavar": "TOKENS"},
        "Of one written verdict, the reasons in it included. See --teacher-reasoning-tokens.",
    ),
    "--judge-quorum": (
        {"type": float, "default": 0.5, "metavar": "SHARE"},
        "A candidate with less than this share of its verdicts, the missing ones asked for once more, is dropped, and "
        "counted; its group stays while two are left.",
    ),
    "--judge-schedule": (
        {"choices": SCHEDULE_NAMES, "default": "circulant_bt"},
        "Which pairs a pairwise criterion compares. all_pairs is the paper's; see docs/judging.md for what each costs.",
    ),
    "--judge-degree": ({"type": int, "default": 6}, "Opponents of each candidate under circulant_bt."),
    "--judge-budget": ({"type": int, "default": 48}, "Comparisons a group under two_ended_bt."),
    "--judge-pivot": (
        {"choices": ["suffix", "rollout"], "default": "suffix"},
        "Whom all candidates meet under pivot: for comparison only, never chosen or rejected.",
    ),
    "--judge-pivot-competes": (
        {"action": "store_true"},
        "The pivot is itself a candidate, of the kinds in --candidates, with a constant win rate of 0.5.",
    ),
    "--judge-both-orders": (
        {"action": "store_true"},
        "Show every pair in both orders, for a judge that prefers whichever option comes first.",
    ),
    "--judge-likelihood-prior": (
        {"action": "store_true"},
        "Start circulant_bt and two_ended_bt from the likelihood, one prefill a candidate; needs --teacher-api sglang.",
    ),
    "--judge-audit-rate": (
        {"type": float, "default": 0.01, "metavar": "SHARE"},
        "Of the groups; on these all pairs are asked too, and the agreement is logged.",
    ),
    "--judge-deadline": ({"type": float, "default": 900.0, "metavar": "SECONDS"}, "For all judgements of one step."),
    "--judge-concurrency": ({"type": int, "default": 256, "metavar": "CALLS"}, "Teacher calls in flight, likewise."),
    "--judge-cache": ({"metavar": "DIR"}, "Keep verdicts on disk; a resumed step then asks no one."),
}


def add_teacher_flags(group: argparse._ActionsContainer) -> None:
    """The servers of judge and rewriter, and how they are to be asked."""
    add_server_flags(group, "teacher")
    add_flags(group, TEACHER_FLAGS)


def judge_settings(args: argparse.Namespace, urls: Sequence[str], role: Role = "teacher") -> JudgeSettings:
    """The judge that the flags describe, at `urls`, the servers of `role`."""
    default_verdict, verdicts = parse_verdicts(args.judge_verdict)
    return JudgeSettings(
        criteria=parse_criteria(args.criteria),
        client=client_settings(args, urls, role),
        votes=args.judge_votes,
        schedule=schedule_settings(args),
        verdicts=verdicts,
        default_verdict=default_verdict,
        temperature=args.judge_temperature,
        top_p=args.judge_top_p,
        max_tokens=args.judge_max_tokens,
        quorum=args.judge_quorum,
        prefix_chars=args.judge_prefix_chars,
        audit_rate=args.judge_audit_rate,
        deadline_s=args.judge_deadline,
    )


def client_settings(args: argparse.Namespace, urls: Sequence[str], role: Role) -> ClientSettings:
    """How judge and rewriter reach the servers of `role` at `urls`."""
    return ClientSettings(
        endpoints=endpoints_of(args, role, urls),
        tokenizer=tokenizer_of(args, role),
        cache_path=Path(args.judge_cache) if args.judge_cache is not None else None,
        call_timeout_s=args.teacher_timeout,
        concurrency=args.judge_concurrency,
        seed=args.seed,
    )


def rewriter_settings(args: argparse.Namespace, urls: Sequence[str]) -> RewriterSettings:
    """The rewriter that the flags describe, at `urls`."""
    return RewriterSettings(
        client=client_settings(args, urls, rewriter_role(args)),
        temperature=args.rewrite_temperature,
        deadline_s=args.judge_deadline,
        prefix_chars=args.judge_prefix_chars,
        seed=args.seed,
    )


def schedule_settings(args: argparse.Namespace) -> ScheduleSettings:
    """Which pairs the judge compares. Raises SettingsError."""
    return ScheduleSettings(
        name=args.judge_schedule,
        degree=args.judge_degree,
        budget=args.judge_budget,
        pivot=args.judge_pivot,
        likelihood_prior=args.judge_likelihood_prior,
        both_orders=args.judge_both_orders,
        pivot_competes=args.judge_pivot_competes,
    )


def flag_for(error: SettingsError, role: Role = "teacher") -> str:
    """The flag that a mistake in the settings comes from, where they are about the servers of `role`."""
    message = str(error)
    flag = next((flag for name, flag in FLAG_OF_SETTING.items() if name in message), "--criteria and --judge-schedule")
    shared = role == "teacher" or flag == "--teacher-timeout"
    return flag if shared else flag.replace("--teacher-", f"--{role.replace('_', '-')}-")
