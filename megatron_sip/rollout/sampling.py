"""What the engines are asked for and what of their answers is a completion: records, requests, checks. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sip.errors import DataError
from megatron_sip.serving.failures import BadResponseError, readable
from megatron_sip.serving.sglang_wire import Result, generate_body, read_results


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
    """Why a request has no result; `kind` is for counting. Never to be read as an empty completion."""

    kind: str
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
            raise DataError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.n < 1:
            raise DataError(f"n must be at least 1, not {self.n}")
        if self.temperature < 0:
            raise DataError(
                "--rollout-temperature, --win-rate-temperature: temperature must not be negative, not "
                f"{self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise DataError(f"--rollout-top-p: top_p must be in (0, 1], not {self.top_p}")


def sampling_body(prefix: Sequence[int], settings: SamplingSettings, seed: int | None = None) -> dict[str, Any]:
    """The /generate request for `settings.n` completions of one prefix, with log-probs.

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
    if seed is None:
        return generate_body(list(prefix), sampling, logprobs=True)
    one_each = [sampling | {"n": 1, "sampling_seed": drawn_seed(seed, number)} for number in range(settings.n)]
    return generate_body([list(prefix)] * settings.n, one_each, logprobs=True)


def logprobs_body(prefix: Sequence[int], continuation: Sequence[int]) -> dict[str, Any]:
    """The /generate request for the log-probs of `continuation` after `prefix`; nothing is generated.

    Log-probs are asked for from the prefix's last token on: what comes before may be taken from the engine's cache.
    """
    sampling = {"max_new_tokens": 0, "temperature": 0.0}
    return generate_body([[*prefix, *continuation]], sampling, logprobs_from=[len(prefix) - 1])


def read_logprobs(
    reply: Any, continuation: Sequence[int], weight_version: str | None = None
) -> tuple[list[float], tuple[int, int, int]]:
    """The log-probs in a reply to `logprobs_body`, one a token; (prompt, cached, completion) tokens.

    Raises BadResponseError, as `read_completions`.
    """
    with readable():
        [result] = read_results(reply, 1)
        result.require_whole()
        found = result.prompt_logprobs(continuation)
        if None in found:
            raise BadResponseError("no log-prob of the first token")
        versions = set() if weight_version is None else result.weight_versions()
        counts = result.token_counts()
    _require_version(versions, weight_version)
    return [value for value in found if value is not None], counts


def drawn_seed(*numbers: int) -> int:
    """A seed from 0 to 2**63 - 1 that is a fixed function of `numbers`, and unrelated for others."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def read_completions(
    reply: Any, settings: SamplingSettings, vocab_size: int | None, weight_version: str | None
) -> tuple[list[Completion], tuple[int, int, int]]:
    """The `settings.n` completions in a /generate reply, with ids below `vocab_size`; (prompt, cached, completion) tokens.

    Raises BadResponseError, of the kind "stale-weights" for a reply by other weights than `weight_version` (None: any).
    """
    with readable():
        results = read_results(reply, settings.n)
        for result in results:
            result.require_whole()
        completions = [_completion(result, settings, vocab_size) for result in results]
        versions = set().union(*(result.weight_versions() for result in results))
        prompt, cached, completion = map(sum, zip(*(result.token_counts() for result in results), strict=True))
    _require_version(versions, weight_version)
    return completions, (prompt, cached, completion)


def _require_version(versions: set[str], wanted: str | None) -> None:
    if wanted is not None and versions != {wanted}:
        raise BadResponseError(f"generated with weights {sorted(versions)}, not {wanted!r}", "stale-weights")


def _completion(result: Result, settings: SamplingSettings, vocab_size: int | None) -> Completion:
    ids, finish = result.output_ids(vocab_size), (result.finish_reason or {}).get("type")
    if finish not in ("stop", "length"):
        raise BadResponseError(f"unknown finish reason {finish!r}")
    if len(ids) > settings.max_new_tokens or (finish == "length" and len(ids) != settings.max_new_tokens):
        raise BadResponseError(f"{len(ids)} tokens and finish reason {finish}, asked {settings.max_new_tokens}")
    return Completion(list(ids), result.output_logprobs(ids), finish, str(result.meta.get("weight_version")))
