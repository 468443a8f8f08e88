"""SGLang's native /generate on the wire: our records, the request bodies, and the checks on what comes back.

Pure functions over plain JSON values. Token ids go in and come out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sip.errors import UserError
from megatron_sip.serving.http_reply import is_logprob

FailureKind = Literal[
    "timeout",  # no answer within the call's time
    "deadline",  # the whole request ran out of time, retries included
    "connection",  # refused, reset, name not resolved
    "http-5xx",
    "http-3xx",  # a redirect, which is not followed
    "http-4xx",  # the request itself is wrong: not retried
    "aborted",  # the engine gave up the generation
    "bad-response",  # an answer that contradicts itself or the request
    "stale-weights",  # generated with other weights than the caller asked for
]
RETRYABLE: frozenset[FailureKind] = frozenset(
    ("timeout", "connection", "http-5xx", "aborted", "bad-response", "stale-weights")
)


class WeightSyncError(UserError, RuntimeError):
    """The weights did not reach every engine, or none; the message says which and why. Raised on all ranks alike."""


class EngineError(UserError, RuntimeError):
    """A call to one engine failed; `kind` says how and the message names the URL."""

    def __init__(self, kind: FailureKind, url: str, message: str) -> None:
        super().__init__(f"{url}: {message}")
        self.kind: FailureKind = kind
        self.url = url


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation.

    `ids` holds exactly `max_new_tokens` tokens, or fewer when it ends with an EOS (or stop) token, which is kept: the
    policy must be able to learn to end. `logprobs` (natural log) has one entry for each id. They are those of the
    model's own distribution at temperature 1 when the engine runs with SGLANG_RETURN_ORIGINAL_LOGPROB=1, as
    `serving.launch` starts it, or when the sampling temperature is 0 or 1; otherwise those of the scaled one.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no result. Never to be read as an empty completion."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to sample. `temperature` 0 is greedy; `top_p` 1 is off; `n` completions for each prefix."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")


def generate_body(prefix: Sequence[int], settings: SamplingSettings, seed: int | None = None) -> dict[str, Any]:
    """JSON body that asks for `settings.n` completions of one prefix, with log-probs.

    With a seed each completion is a request of its own, under a seed drawn from it: SGLang gives the one seed of a request
    with n > 1 to all its copies, and an engine with deterministic inference then returns n times the same.
    """
    sampling: dict[str, Any] = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": -1,  # off, whatever the engine's default
        "n": settings.n,
    }
    body: dict[str, Any] = {"input_ids": list(prefix), "sampling_params": sampling, "return_logprob": True}
    if seed is None:
        return body
    one_each = [sampling | {"n": 1, "sampling_seed": drawn_seed(seed, number)} for number in range(settings.n)]
    return body | {"input_ids": [list(prefix)] * settings.n, "sampling_params": one_each}


def drawn_seed(*numbers: int) -> int:
    """A seed from 0 to 2**63 - 1 that is a fixed function of `numbers`, and unrelated for others."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def read_reply(
    reply: Any, url: str, settings: SamplingSettings, vocab_size: int | None, weight_version: str | None
) -> tuple[list[Completion], tuple[int, int, int]]:
    """The `settings.n` completions in a /generate reply, with ids below `vocab_size`, and its `token_counts`.

    Whatever a reply does to a parser is the reply's fault. Raises EngineError, of the kind "stale-weights" for a reply by
    other weights than `weight_version` (None: any).
    """
    try:
        completions = [_completion(result, settings, url, vocab_size) for result in _results(reply, settings.n, url)]
        versions, counts = served_versions(reply), token_counts(reply)
    except EngineError:
        raise
    except Exception as error:
        shown = f"{type(error).__name__}: {error}; reply {str(reply)[:200]!r}"
        raise EngineError("bad-response", url, shown) from error
    if weight_version is not None and versions != {weight_version}:
        raise EngineError("stale-weights", url, f"generated with weights {sorted(versions)}, not {weight_version!r}")
    return completions, counts


def served_versions(reply: Any) -> set[str]:
    """All weight versions that took part in a reply; more than one when weights changed during the generation."""
    versions: set[str] = set()
    for result in reply if isinstance(reply, list) else [reply]:
        meta = result["meta_info"]
        spans = meta.get("weight_versions") or [{"version": meta["weight_version"]}]
        versions.update(str(span["version"]) for span in spans)
    return versions


def token_counts(reply: Any) -> tuple[int, int, int]:
    """(prompt, cached prompt, completion) tokens that a reply reports, summed over its results."""
    metas = [result["meta_info"] for result in (reply if isinstance(reply, list) else [reply])]
    return (
        sum(int(meta.get("prompt_tokens") or 0) for meta in metas),
        sum(int(meta.get("cached_tokens") or 0) for meta in metas),
        sum(int(meta.get("completion_tokens") or 0) for meta in metas),
    )


def _results(reply: Any, count: int, url: str) -> list[Mapping[str, Any]]:
    results = reply if isinstance(reply, list) else [reply]
    if len(results) != count:
        raise EngineError("bad-response", url, f"{len(results)} results instead of {count}")
    for result in results:
        if not isinstance(result, dict) or not isinstance(result.get("meta_info"), dict):
            raise EngineError("bad-response", url, f"no meta_info in the result {str(result)[:200]!r}")
        reason = result["meta_info"].get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise EngineError("aborted", url, f"the engine aborted the request: {reason.get('message', 'no reason')}")
    return results


def _completion(result: Mapping[str, Any], settings: SamplingSettings, url: str, vocab_size: int | None) -> Completion:
    meta = result["meta_info"]
    ids = result.get("output_ids")
    finish_reason = (meta.get("finish_reason") or {}).get("type")
    if not isinstance(ids, list) or not ids:
        raise EngineError("bad-response", url, "a result without output_ids")
    if not all(type(token) is int and token >= 0 and (vocab_size is None or token < vocab_size) for token in ids):
        raise EngineError("bad-response", url, f"output_ids that are no token ids below {vocab_size}")
    if finish_reason not in ("stop", "length"):
        raise EngineError("bad-response", url, f"unknown finish reason {finish_reason!r}")
    if len(ids) > settings.max_new_tokens or (finish_reason == "length" and len(ids) != settings.max_new_tokens):
        raise EngineError(
            "bad-response", url, f"{len(ids)} tokens and finish reason {finish_reason}, asked {settings.max_new_tokens}"
        )
    logprobs = _aligned(meta.get("output_token_logprobs"), ids, url)
    return Completion(list(ids), logprobs, finish_reason, str(meta.get("weight_version")))


def _aligned(entries: Any, ids: Sequence[int], url: str) -> list[float]:
    """The log-probs of SGLang's [log-prob, token id, text] entries, when they are those of `ids`, in order."""
    if not isinstance(entries, list) or len(entries) != len(ids):
        found = len(entries) if isinstance(entries, list) else "no"
        raise EngineError("bad-response", url, f"{found} log-probs for {len(ids)} tokens")
    if any(entry[1] != token for entry, token in zip(entries, ids, strict=True)):
        raise EngineError("bad-response", url, "log-probs of other tokens than the output's")
    logprobs = [entry[0] for entry in entries]
    if not all(map(is_logprob, logprobs)):
        raise EngineError("bad-response", url, "a log-prob that is not a finite number of at most 0")
    return [float(value) for value in logprobs]
