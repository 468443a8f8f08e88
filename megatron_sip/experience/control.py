"""Control texts: a good and a bad candidate of a group are both learnt, each behind a text of its own before the prefix.

    [BOS] [safety: good]\\n The prefix ... -> the best of the candidates that are good
    [BOS] [safety: bad]\\n  The prefix ... -> the worst of those that are bad

At inference the text before a prompt says which of the two is wanted (Keskar et al. 2019; Korbak et al. 2023, conditional
training). Pure Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_sip.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Control:
    """criterion: as its scores are filed. good, bad: what is put before the prefix. threshold: the least score that is good.

    Raises ValueError: texts that are empty or equal, or no finite threshold.
    """

    criterion: str
    good: str
    bad: str
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.good or not self.bad or self.good == self.bad:
            raise ValueError(f"--control-text {self.good!r} {self.bad!r}: two different texts are needed, GOOD and BAD")
        if not math.isfinite(self.threshold):
            raise ValueError(f"--control-threshold {self.threshold}: a finite score is needed")

    @classmethod
    def of(cls, criterion: str, texts: tuple[str, str] | None, threshold: float) -> Control:
        """With `texts`, or else with plain words that every tokenizer splits into ordinary tokens."""
        good, bad = texts or (f"[{criterion}: good]\n", f"[{criterion}: bad]\n")
        return cls(criterion, good, bad, threshold)

    @property
    def room(self) -> int:
        """The most tokens that a control text can take: no tokenizer makes more than there are bytes, but for a space
        that some put before any text."""
        return 1 + max(len(text.encode()) for text in (self.good, self.bad))


@dataclass(frozen=True, slots=True)
class ControlIds:
    """The token ids of the control texts, and the BOS that they stand behind where a prefix begins with it."""

    good: tuple[int, ...]
    bad: tuple[int, ...]
    bos: int | None

    @classmethod
    def of(cls, control: Control, tokenizer: Any) -> ControlIds:
        """`tokenizer`: transformers', of the policy; special tokens that are named in a control text are recognised.

        Raises ArgumentError: it makes nothing, or the same, of both texts.
        """
        good, bad = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (control.good, control.bad))
        if not good or not bad or good == bad:
            raise ArgumentError(
                f"--control-text {control.good!r} {control.bad!r}: the policy's tokenizer does not tell them apart"
            )
        return cls(good, bad, tokenizer.bos_token_id)

    def before(self, prefix: list[int], *, good: bool) -> tuple[list[int], int]:
        """(`prefix` behind its control text, the number of tokens at its left that must not be cut off)."""
        start = int(self.bos is not None and prefix[:1] == [self.bos])
        head = [*prefix[:start], *(self.good if good else self.bad)]
        return [*head, *prefix[start:]], len(head)
