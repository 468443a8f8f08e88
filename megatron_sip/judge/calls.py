"""What a judge's server can be asked: three kinds of calls, independent of the server's protocol.

An answer is plain JSON data, so that it can be cached: a list of values or texts for `GenerateCall`, one value for
`ChoiceCall`, one log-prob for `LikelihoodCall`. None inside it is a missing vote or text; None instead of it a failed call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from megatron_sip.judge.verdicts import VerdictRule

Answer = list[float | None] | list[str | None] | float | None

READING = 2
"""Version of how answers are asked for and read: raised when the same response comes to mean something else."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """`n` sampled answers to a prompt. With `rule` they are read as verdicts (list[float | None]), else kept as texts.

    `start` begins the answer; a server's text does not repeat it. `again`: asked for what an answer lacked; another draw.
    """

    identity: str
    prompt: tuple[str, ...]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    rule: VerdictRule | None = None
    start: str = ""
    salt: int = 0
    again: bool = False

    def cache_fields(self) -> list[Any]:
        sampling = [self.max_tokens, self.temperature, self.top_p, self.start, self.salt]
        return [f"generate@{READING}", self.n, *sampling, *(["again"] if self.again else [])]


@dataclass(frozen=True, slots=True)
class ChoiceCall:
    """The expected value of the verdict by its probabilities after `rule.start`: one forward pass, no sampling."""

    identity: str
    prompt: tuple[str, ...]
    rule: VerdictRule
    max_tokens: int = 512

    def cache_fields(self) -> list[Any]:
        return [f"choice@{READING}", self.rule.start]


@dataclass(frozen=True, slots=True)
class LikelihoodCall:
    """Mean log-prob (nats) of the continuation's tokens after the prefix, in the judge's own tokens, no chat template.

    `ended`: the document ends there, and the token that says so is one of them."""

    identity: str
    prompt: tuple[str, str]  # prefix, continuation
    ended: bool = False

    def cache_fields(self) -> list[Any]:
        return ["likelihood", self.ended]


Call = GenerateCall | ChoiceCall | LikelihoodCall


def votes_that_came(call: Call, answer: Answer, *, failed: bool) -> Answer:
    """What of an answer may be kept: not its missing votes, which a later run shall ask for; None when nothing is left.

    The answer of a call that was made for missing votes is kept whole or not at all, since none is made for it; and so is one
    of which something `failed`, or what is missing would later seem to be answers that nobody can read.
    """
    if not isinstance(call, GenerateCall) or not isinstance(answer, list):
        return answer
    came = [vote for vote in answer if vote is not None]
    return came if len(came) == call.n or (came and not call.again and not failed) else None  # type: ignore[return-value]


def cache_material(call: Call, model: str) -> bytes:
    """Everything that an answer depends on, as bytes: judge model, prompt version and wording, sampling, texts."""
    return orjson.dumps([model, call.identity, *call.cache_fields(), *call.prompt])
