"""SGLang's native /generate on the wire: who writes its requests and reads its replies, for engines and judges alike.

Pure functions over plain JSON values; token ids go in and come out. Readers raise BadResponseError, or what a value of another
type than promised raises: read inside `failures.readable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sip.serving.failures import BadResponseError
from megatron_sip.serving.http_reply import is_logprob

GENERATE_PATH = "/generate"


def generate_body(
    prompts: Sequence[Any],
    sampling: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    logprobs: bool = False,
    logprobs_from: int | Sequence[int] | None = None,
    logprobs_of: Sequence[Any] | None = None,
    top_logprobs: int = 0,
) -> dict[str, Any]:
    """A request for one prompt (token ids), or for several (lists of them), with `sampling` for all of them or for each.

    logprobs: with those of the output's tokens. logprobs_from: and those of each prompt's own tokens from this place on.
    logprobs_of: and those of these tokens (of several prompts a list for each) at each place of the output. top_logprobs: and
    of so many of the likeliest tokens at each place that log-probs are asked for.
    """
    body: dict[str, Any] = {"input_ids": prompts, "sampling_params": sampling}
    if logprobs or logprobs_from is not None or logprobs_of is not None:
        body["return_logprob"] = True
    if logprobs_from is not None:
        body["logprob_start_len"] = logprobs_from
    if logprobs_of is not None:
        body["token_ids_logprob"] = logprobs_of
    if top_logprobs:
        body["top_logprobs_num"] = top_logprobs
    return body


@dataclass(frozen=True, slots=True)
class Result:
    """One result of a reply; `fields` stand beside its `meta`."""

    fields: Mapping[str, Any]
    meta: Mapping[str, Any]

    @property
    def text(self) -> Any:
        return self.fields["text"]

    @property
    def finish_reason(self) -> Any:
        """A dict with a "type" ("stop", "length", "abort"), or nothing."""
        return self.meta.get("finish_reason")

    def output_ids(self, vocab_size: int | None) -> list[int]:
        """At least one token id, all below `vocab_size` (None: not known)."""
        ids = self.fields.get("output_ids")
        if not isinstance(ids, list) or not ids:
            raise BadResponseError("a result without output_ids")
        if not all(type(token) is int and token >= 0 and (vocab_size is None or token < vocab_size) for token in ids):
            raise BadResponseError(f"output_ids that are no token ids below {vocab_size}")
        return ids

    def output_logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log-probs (natural log) of the output's tokens, which are to be `ids`."""
        return [logprob(entry[0]) for entry in _entries_of(self.meta.get("output_token_logprobs"), ids)]

    def prompt_logprobs(self, ids: Sequence[int]) -> list[float | None]:
        """The log-probs of the prompt's last tokens, which are to be `ids`; None for a text's first, which follows nothing."""
        entries = _entries_of(self.meta["input_token_logprobs"][-len(ids) :] if ids else [], ids)
        return [None if value is None and not place else logprob(value) for place, (value, *_) in enumerate(entries)]

    def prompt_top_ids(self, count: int) -> list[int]:
        """The likeliest token at each of the prompt's last `count` places."""
        top = self.meta["input_top_logprobs"][-count:]
        if len(top) != count:
            raise BadResponseError(f"{len(top)} likeliest tokens for {count} places")
        return [int(entries[0][1]) for entries in top]

    def require_whole(self) -> None:
        """Raises BadResponseError for what the engine gave up."""
        if (self.finish_reason or {}).get("type") == "abort":
            why = self.finish_reason.get("message", "no reason")
            raise BadResponseError(f"the engine aborted the request: {why}", "aborted")

    def first_logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log-probs of the tokens `ids` at the output's first place."""
        found = {entry[1]: logprob(entry[0]) for entry in self.meta["output_token_ids_logprobs"][0]}
        return [found[token] for token in ids]

    def weight_versions(self) -> set[str]:
        """All that took part; more than one when weights changed during the generation."""
        spans = self.meta.get("weight_versions") or [{"version": self.meta["weight_version"]}]
        return {str(span["version"]) for span in spans}

    def token_counts(self) -> tuple[int, int, int]:
        """(prompt, cached prompt, completion) tokens, 0 where the server does not say."""
        prompt, cached, completion = (
            int(self.meta.get(f"{name}_tokens") or 0) for name in ("prompt", "cached", "completion")
        )
        return prompt, cached, completion


def read_results(reply: Any, count: int) -> list[Result]:
    """The `count` results of a reply, in the order of its prompts, copies of one together. Raises BadResponseError."""
    results = reply if isinstance(reply, list) else [reply]
    if len(results) != count:
        raise BadResponseError(f"{len(results)} results instead of {count}")
    for result in results:
        if not isinstance(result, dict) or not isinstance(result.get("meta_info"), dict):
            raise BadResponseError(f"no meta_info in the result {str(result)[:200]!r}")
    return [Result(result, result["meta_info"]) for result in results]


def logprob(value: Any) -> float:
    """A log-prob that a server gave. Raises BadResponseError when it can be none: it would turn a verdict round."""
    if not is_logprob(value):
        raise BadResponseError(f"{str(value)[:40]!r} is no log-prob: not a finite number of at most 0")
    return float(value)


def _entries_of(entries: Any, ids: Sequence[int]) -> Sequence[Sequence[Any]]:
    """SGLang's [log-prob, token id, text] entries, when they are those of `ids`, in order."""
    if not isinstance(entries, list) or len(entries) != len(ids):
        found = len(entries) if isinstance(entries, list) else "no"
        raise BadResponseError(f"{found} log-probs for {len(ids)} tokens")
    if any(entry[1] != token for entry, token in zip(entries, ids, strict=True)):
        raise BadResponseError("log-probs of other tokens, not those of the continuation")
    return entries
