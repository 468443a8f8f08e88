"""How a chat API wants its requests: learnt from what it refuses, in whatever words, one parameter after the other."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

log = logging.getLogger(__name__)

TOP_LOGPROBS = 20

_ANOTHER_LIMIT = re.compile(r"max_completion_tokens")
_TOO_LONG = re.compile(r"too (?:large|long|many)|context (?:length|window)|maximum context|exceed", re.IGNORECASE)
_LOGPROBS = re.compile(r"log[ _-]?prob", re.IGNORECASE)
_BOUND = re.compile(r"at most|less|below|between|max|up to|exceed|greater|larger|range|<|≤|>|limit|\[\d", re.IGNORECASE)
_NAMED: dict[str, re.Pattern[str]] = {
    "top_p": re.compile(r"\btop[ _-]?p\b|nucleus", re.IGNORECASE),
    "n": re.compile(
        r"[\"'`]n[\"'`]|\bparameter:? n\b|\bn ?(?:=|>|must|is |has to|should|can)"
        r"|(?<!\\)\bn:|: n(?![\w'’])"
        r"|(?i:multiple|only one|more than one|single|(?:number|count) of) (?:choice|completion|candidate|sample|generation)"
    ),
    "temperature": re.compile(r"\btemperature\b", re.IGNORECASE),
}
"""What can be left out, and how it is named; where a refusal names several, the first goes."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """completion_limit: max_completion_tokens in place of max_tokens. without: parameters that it refuses."""

    completion_limit: bool = False
    without: frozenset[str] = frozenset()
    top_logprobs: int = TOP_LOGPROBS

    def __str__(self) -> str:
        changes = [f"without {name}" for name in sorted(self.without)]
        changes += ["with max_completion_tokens"] * self.completion_limit
        changes += [f"with top_logprobs {self.top_logprobs}"] * (self.top_logprobs < TOP_LOGPROBS)
        return ", ".join(changes) or "unchanged"

    def adapted(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request as the server wants it."""
        own = {name: value for name, value in body.items() if name not in self.without}
        if self.completion_limit and "max_tokens" in own:
            own["max_completion_tokens"] = own.pop("max_tokens")
        if "top_logprobs" in own:
            own["top_logprobs"] = min(own["top_logprobs"], self.top_logprobs)
        return own

    def after(self, refusal: str, body: Mapping[str, Any]) -> Dialect | None:
        """What to try when the server refused `body` in these words; None when they name nothing that could be changed."""
        if "max_tokens" in body and _ANOTHER_LIMIT.search(refusal) and not _TOO_LONG.search(refusal):
            return replace(self, completion_limit=True)
        if "logprobs" in body and _LOGPROBS.search(refusal):
            asked = body.get("top_logprobs", 0)
            allowed = [number for number in map(int, re.findall(r"\b\d{1,3}\b", refusal)) if 0 < number < asked]
            if allowed and _BOUND.search(refusal):
                return replace(self, top_logprobs=max(allowed))
            return replace(self, without=self.without | {"logprobs", "top_logprobs"})
        named = next((name for name, words in _NAMED.items() if name in body and words.search(refusal)), None)
        return None if named is None else replace(self, without=self.without | {named})


class Dialects:
    """What is known of each server's dialect, by URL: what has worked, and what is being tried."""

    def __init__(self) -> None:
        self._proven: dict[str, Dialect] = {}
        self._current: dict[str, Dialect] = {}

    def of(self, url: str) -> Dialect:
        return self._current.get(url, Dialect())

    def try_out(self, url: str, dialect: Dialect) -> None:
        self._current[url] = dialect

    def prove(self, url: str, dialect: Dialect, refusal: str) -> None:
        """A request was refused in other words and answered in these."""
        if self._proven.get(url) != dialect:
            self._proven[url] = self._current[url] = dialect
            log.warning("judge server %s: requests are sent %s from now on; it said: %s", url, dialect, refusal[:300])

    def forget_trial(self, url: str) -> None:
        self._current[url] = self._proven.get(url, Dialect())


class DialectTrial:
    """One request's search for the words that its server takes.

    What it tries holds for all requests at once, so that not each of them has to be refused, and is taken back when it did
    not help: a refusal may quote the texts that were sent, and these may say anything.
    """

    def __init__(self, dialects: Dialects) -> None:
        self._dialects = dialects
        self._refusals: dict[str, str] = {}  # the first of each server

    def another(self, url: str, used: Dialect, body: Mapping[str, Any], refusal: str) -> bool:
        """Whether to ask again after `body` in the dialect `used` was refused: there is something else to try."""
        first = url not in self._refusals
        self._refusals.setdefault(url, refusal)
        if first and self._dialects.of(url) != used:
            return True  # another request has found something meanwhile
        found = used.after(refusal, body)
        if found is not None:
            self._dialects.try_out(url, found)
        return found is not None

    def undo(self) -> None:
        """The request failed after all."""
        for url in self._refusals:
            self._dialects.forget_trial(url)

    def keep(self, url: str, used: Dialect) -> None:
        """The server at `url` has answered in the dialect `used`."""
        if url in self._refusals:
            self._dialects.prove(url, used, self._refusals[url])
