"""What judge, rewriter and the clients of their servers are told, from the flags."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_sip.config.flags import Role
from megatron_sip.config.needs import criteria_of, has_served_criteria, has_servers
from megatron_sip.judge.rewriter import RewriterSettings
from megatron_sip.judge.settings import (
    DEFAULT_MODEL,
    ClientSettings,
    Endpoint,
    JudgeSettings,
    ScheduleSettings,
    parse_criteria,
    parse_verdicts,
)


def judge_settings(args: argparse.Namespace, role: Role = "teacher") -> JudgeSettings:
    """The judge that the flags describe, at the servers of `role`. Raises SettingsError."""
    default_verdict, verdicts = parse_verdicts(args.judge_verdict)
    return JudgeSettings(
        criteria=parse_criteria(criteria_of(args)),
        client=client_settings(args, role) if has_served_criteria(args) else None,
        votes=args.judge_votes,
        schedule=schedule_settings(args),
        verdicts={} if args.tasks == "judgements" else verdicts,  # there they are the ways of the judge in training
        default_verdict=default_verdict,
        temperature=args.judge_temperature,
        top_p=args.judge_top_p,
        max_tokens=args.judge_max_tokens,
        quorum=args.judge_quorum,
        prefix_chars=args.judge_prefix_chars,
        audit_rate=args.judge_audit_rate,
        deadline_s=args.judge_deadline,
        function_timeout_s=args.criteria_timeout,
        function_processes=args.criteria_processes,
    )


def rating_settings(args: argparse.Namespace, role: Role) -> JudgeSettings:
    """Of the judge at the servers of `role` that rates safety by the majority of its votes (section 3.3).

    Raises SettingsError.
    """
    return JudgeSettings(
        criteria={"safety": 1.0},
        client=replace(client_settings(args, role), replicas=1),  # the first leader rates alone
        votes=args.judge_votes,
        default_verdict="hard",
        temperature=1.0,
        top_p=1.0,  # the trainer's default would make a vote of 60% unanimous
        max_tokens=args.judge_max_tokens,
        quorum=args.judge_quorum,
        prefix_chars=args.judge_prefix_chars,
        audit_rate=0.0,
        deadline_s=args.judge_deadline,
    )


def rewriter_settings(args: argparse.Namespace) -> RewriterSettings:
    """The rewriter that the flags describe. Raises SettingsError."""
    return RewriterSettings(
        client=client_settings(args, "rewriter" if has_servers(args, "rewriter") else "teacher"),
        temperature=args.rewrite_temperature,
        prompt_file=Path(args.rewrite_prompt) if args.rewrite_prompt else None,
        deadline_s=args.judge_deadline,
        prefix_chars=args.judge_prefix_chars,
        seed=args.seed,
    )


def replicas(args: argparse.Namespace) -> int:
    """Data-parallel replicas among which calls are divided; one where no process was started, or none trains."""
    return int(getattr(args, "data_parallel_size", 1))


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


def client_settings(args: argparse.Namespace, role: Role) -> ClientSettings:
    """How judge and rewriter reach the servers of `role`. Raises SettingsError."""
    own = {name.removeprefix(f"{role}_"): value for name, value in vars(args).items() if name.startswith(f"{role}_")}
    endpoints = tuple(
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
            role=role,
        )
        for url in own["url"] or [f"http://{role.replace('_', '-')}"]
    )
    return ClientSettings(
        endpoints=endpoints,
        tokenizer=own["tokenizer"] or own.get("model"),  # None: the servers say
        cache_path=Path(args.judge_cache) if args.judge_cache is not None else None,
        call_timeout_s=args.teacher_timeout,
        concurrency=args.judge_concurrency,
        replicas=1 if role == "eval_judge" else replicas(args),  # which the first leader asks alone
        seed=args.seed,
    )
