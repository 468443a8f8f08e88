"""Flags of the servers that judge and rewrite: the teacher's, and those of a rewriter or a last judge of their own.

Every role has the same flags, --ROLE-url, --ROLE-api, ...; what names no servers of its own is the teacher's work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from megatron_sip.judge.settings import DEFAULT_MODEL, Endpoint

Role = Literal["teacher", "rewriter", "eval_judge"]
ROLES: dict[Role, str] = {
    "teacher": "the judge and rewriter",
    "rewriter": "the rewriter, where it is not the teacher",
    "eval_judge": "the judge of the held-out comparison, where it is not the teacher",
}
"""By the name among the arguments -> what the servers are."""


def add_server_flags(group: argparse._ActionsContainer, role: Role) -> None:
    """How the servers of `role` are reached and asked."""
    prefix = f"--{role.replace('_', '-')}"
    model = f" Default: {prefix}-model, or" if role != "eval_judge" else " Default:"
    group.add_argument(f"{prefix}-url", nargs="+", metavar="URL", help=f"Running servers of {ROLES[role]}.")
    group.add_argument(
        f"{prefix}-api",
        choices=["sglang", "openai"],
        default="sglang",
        help="sglang: native API (likelihood and soft verdicts). openai: any OpenAI-compatible server.",
    )
    group.add_argument(
        f"{prefix}-name",
        default=None,
        metavar="MODEL",
        help="Model name sent to an OpenAI-type server, and the name that --judge-cache keeps answers under. Default for "
        "SGLang: the name that the server reports.",
    )
    group.add_argument(
        f"{prefix}-key-variable", default=None, metavar="NAME", help="Environment variable that holds the API key."
    )
    group.add_argument(
        f"{prefix}-tokenizer",
        metavar="DIR",
        help=f"Tokenizer of an SGLang server's model.{model} the path that the server reports.",
    )
    group.add_argument(
        f"{prefix}-prefill",
        action="store_true",
        help="An OpenAI-type server continues an answer that we begin (vLLM, SGLang): soft verdicts then cost one token.",
    )
    group.add_argument(
        f"{prefix}-answer-prefix",
        default="",
        metavar="TEXT",
        help="Put between an SGLang model's chat template and an answer that we begin, special tokens included. Default: "
        "what its template needs to end reasoning, as </think> or gpt-oss's <|channel|>final<|message|>.",
    )
    _add_limits(group, prefix)


def _add_limits(group: argparse._ActionsContainer, prefix: str) -> None:
    group.add_argument(
        f"{prefix}-reasoning-tokens",
        type=int,
        default=0,
        metavar="TOKENS",
        help="For reasoning (gpt-oss, <think>), on top of each written answer's own tokens. Needed for written verdicts of "
        "a model that always reasons, for example 2048.",
    )
    group.add_argument(
        f"{prefix}-context",
        type=int,
        default=None,
        metavar="TOKENS",
        help="What a request and its answer may take together; of longer prefixes only the end is shown, and counted. "
        "Default: what the server reports.",
    )
    group.add_argument(
        f"{prefix}-requests-per-second", type=float, default=0.0, metavar="N", help="Limit for each URL; 0: none."
    )


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
