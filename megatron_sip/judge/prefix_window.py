"""How much of a prefix a judge or rewriter is shown: of its end as much as their context holds beside the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BYTES_PER_TOKEN = 3
"""For servers whose tokenizer is not known: English has about four, so that this errs to the safe side."""
MIN_PREFIX_TOKENS = 16
"""A judge that can be shown less than this of a longer prefix judges something else than a continuation."""
MARGIN_TOKENS = 16
"""Tokens may merge differently where texts meet, and the code in the marks around texts varies."""


def estimated_tokens(text: str) -> int:
    """An upper estimate of a text's tokens in most tokenizers."""
    return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class PrefixWindow:
    """`chars` is the most that is ever shown; `context` the tokens that a request and its answer may take together (None:
    not known), as `count` counts them."""

    chars: int
    context: int | None = None
    count: Callable[[str], int] = estimated_tokens

    def shown(self, prefix: str, beside: Callable[[], int]) -> str | None:
        """The end of `prefix` that fits beside `beside()` other tokens of the same request; None when next to none does.

        `beside` is only called where the context is known.
        """
        text = cut_prefix(prefix, self.chars)
        if self.context is None:
            return text
        left = self.context - beside() - MARGIN_TOKENS
        if len(text.encode("utf-8", "replace")) <= left:  # no tokenizer makes more tokens than there are bytes
            return text
        while (tokens := self.count(text)) > left:
            if left < MIN_PREFIX_TOKENS:
                return None
            text = cut_prefix(text, min(len(text) - 1, len(text) * left // tokens))
        return text


def cut_prefix(text: str, chars: int) -> str:
    """The last `chars` characters, from the next word on when that is near."""
    if len(text) <= chars:
        return text
    tail = text[-chars:]
    space = tail.find(" ", 0, 50)
    return tail[space + 1 :] if space >= 0 else tail
