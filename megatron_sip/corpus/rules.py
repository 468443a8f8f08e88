"""Which documents stay in a corpus: each rule says of a document why it goes, and the first that does is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Document:
    """A document as a shard has it.

    id: unique in its corpus, as far as its makers kept that. subset: what it is counted under. signals: the quality signals
    that came with it, by name (RedPajama-V2's lists of [start, end, score]; empty where its row is lacking); None for corpora
    that have none.
    """

    id: str
    text: str
    subset: str
    signals: Mapping[str, Any] | None = None


class Rule(Protocol):
    """A rule is sent to worker processes (so it can be pickled), and what it says depends on the document alone."""

    @property
    def name(self) -> str:
        """What its drops are counted under."""

    def reason(self, document: Document) -> str | None:
        """Why the document goes, one of a few words (`word_count/low`, the name of a set that it overlaps); None keeps it."""


def first_reason(rules: Sequence[Rule], document: Document) -> str | None:
    """`NAME/REASON` of the first rule that drops the document, as it is counted; None: all keep it."""
    for rule in rules:
        if (reason := rule.reason(document)) is not None:
            return f"{rule.name}/{reason}"
    return None
