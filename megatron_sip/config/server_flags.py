"""Flags of the servers that judge and rewrite: the teacher's, and those of a rewriter or a last judge of their own.

Every role has the same flags, --ROLE-url, --ROLE-api, ...; what names no servers of its own is the teacher's work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Literal

from megatron_sip.judge.settings import DEFAULT_MODEL, Endpoint

Role = Literal["teacher", "rewriter", "eval_judge"]
ROLES: dict[Role, str] = {
    "teacher": "the judge and rewriter",
    "rewriter": "the rewriter, where it is not the teacher",
    "eval_judge": "the judge of the held-out comparison, where it is not the teacher",
}
"""By the name among the arguments -> what the servers are."""


Flags = dict[str, tuple[dict[str, Any], str]]
"""Flag -> (settings for argparse, help)."""
FLAGS: Flags = {
    "url": ({"nargs": "+", "metavar": "URL"}, "Running servers of the judge and rewriter."),
    "api": (
        {"choices": ["sglang", "openai"], "default": "sglang"},
        "sglang: native API (likelihood and soft verdicts). openai: any OpenAI-compatible server.",
    ),
    "name": (
        {"metavar": "MODEL"},
        "Model name sent to an OpenAI-type server, and the name that --judge-cache keeps answers under. Default for SGLang: "
        "the name that the server reports.",
    ),
    "key-variable": ({"metavar": "NAME"}, "Environment variable that holds the API key."),
    "tokenizer": (
        {"metavar": "DIR"},
        "Tokenizer of an SGLang teacher. Default: --teacher-model, or the path that the server reports.",
    ),
    "prefill": (
        {"action": "store_true"},
        "An OpenAI-type server continues an answer that we begin (vLLM, SGLang): soft verdicts then cost one token.",
    ),
    "answer-prefix": (
        {"metavar": "TEXT", "default": ""},
        "Put between an SGLang teacher's chat template and an answer that we begin, special tokens included. Default: what "
        "its template needs to end reasoning, as </think> or gpt-oss's <|channel|>final<|message|>.",
    ),
    "reasoning-tokens": (
        {"type": int, "metavar": "TOKENS", "default": 0},
        "For reasoning (gpt-oss, <think>), on top of each written answer's own tokens. Needed for written verdicts of a "
        "model that always reasons, for example 2048.",
    ),
    "context": (
        {"type": int, "metavar": "TOKENS"},
        "What a request and its answer may take together; of longer prefixes only the end is shown, and counted. Default: "
        "what the server reports.",
    ),
    "requests-per-second": ({"type": float, "metavar": "N", "default": 0.0}, "Limit for each URL; 0: none."),
}
"""Name, the same for each role, instead of the flag."""


def add_flags(group: argparse._ActionsContainer, flags: Flags) -> None:
    for name, (settings, text) in flags.items():
        group.add_argument(name, **settings, help=text)


def add_server_flags(group: argparse._ActionsContainer, role: Role) -> None:
    """How the servers of `role` are reached and asked."""
    prefix = f"--{role.replace('_', '-')}"
    for name, (settings, text) in FLAGS.items():
        short = f"Servers of {ROLES[role]}." if name == "url" else f"As --teacher-{name}."
        group.add_argument(f"{prefix}-{name}", **settings, help=text if role == "teacher" else short)


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
