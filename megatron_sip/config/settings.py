"""The settings that the flags describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_sip.config.flags import Role
from megatron_sip.judge.rewriter import RewriterSettings
from megatron_sip.judge.settings import (
    DEFAULT_MODEL,
    ClientSettings,
    Endpoint,
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


def has_servers(args: argparse.Namespace, role: Role) -> bool:
    """Whether the flags name servers for `role` itself, running or to be started."""
    return bool(getattr(args, f"{role}_url", None) or getattr(args, f"{role}_model", None))


def rewriter_role(args: argparse.Namespace) -> Role:
    """Whose servers rewrite."""
    return "rewriter" if has_servers(args, "rewriter") else "teacher"


def endpoints_of(args: argparse.Namespace, role: Role, urls: Sequence[str]) -> tuple[Endpoint, ...]:
    """The servers of `role` at `urls` as judge and rewriter address them. Raises SettingsError."""
    own = {name.removeprefix(f"{role}_"): value for name, value in vars(args).items() if name.startswith(f"{role}_")}
    return tuple(
        Endpoint(
            url,
            own["api"],
            own["name"] or DEFAULT_MODEL,
            api_key_env=own["key_variable"],
            prefill=own["prefill"],
            answer_prefix=own["answer_prefix"],
            reasoning_tokens=own["reasoning_tokens"],
            requests_per_s=own["requests_per_second"],
            context_tokens=own["context"],
        )
        for url in urls
    )


def tokenizer_of(args: argparse.Namespace, role: Role) -> str | None:
    """The tokenizer of the model that `role` serves, None where the servers are to say."""
    return getattr(args, f"{role}_tokenizer") or getattr(args, f"{role}_model", None)
