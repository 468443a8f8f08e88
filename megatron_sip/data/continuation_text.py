"""The texts of a prefix and its suffix, such that one continues the other exactly.

Decoding token ids piecewise goes wrong at the seams: some tokenizers drop a leading space, and a character may be cut
between its bytes, which shows as U+FFFD (with byte fallback for the whole run of byte tokens). Here a seam inside a
character is moved to the character's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_MAX_PARTIAL = 3
"""Bytes, and so at most tokens, of an unfinished UTF-8 character."""
LOOKAHEAD = _MAX_PARTIAL
"""Tokens after the suffix that are enough to finish its last character."""


def continuation_texts(
    tokenizer: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    suffix: Sequence[int],
    after: Sequence[int] = (),
    *,
    cut_before: bool = False,
) -> tuple[str, str]:
    """(prefix text, suffix text): their concatenation is the decoded document, spaces at the seam included.

    A character that straddles the seam belongs whole to the suffix. One that the suffix begins but does not finish is
    left out; `after`, the next tokens of the document, tells it from a replacement character that the document really
    contains. `cut_before` says that the document has tokens before `prefix`: a partial first character is left out too.
    Special tokens are not shown. A prefix of less than one character has the text "".
    """
    prefix = list(prefix)
    following = [*suffix, *after]
    before = _whole_characters(tokenizer, prefix, following)
    if cut_before and before.startswith(_REPLACEMENT):
        for skip in range(1, min(_MAX_PARTIAL, len(prefix) - 1) + 1):
            shorter = _whole_characters(tokenizer, prefix[skip:], following)
            if not shorter.startswith(_REPLACEMENT):
                prefix, before = prefix[skip:], shorter
                break
    both = _whole_characters(tokenizer, [*prefix, *suffix], after)
    if both.startswith(before):
        return before, both[len(before) :]
    return before, _decode(tokenizer, suffix)  # a decoder whose output for a prefix depends on what follows


def _whole_characters(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], following: Sequence[int]) -> str:
    """The text of `ids` without an unfinished last character, which `following` tokens of the document finish."""
    text = _decode(tokenizer, ids)
    if not text.endswith(_REPLACEMENT):
        return text
    longer = [_decode(tokenizer, [*ids, *following[:count]]) for count in range(min(LOOKAHEAD, len(following)) + 1)]
    # One that ends clean tells. If none does, the document really contains U+FFFD: a whole one is shorter than its bytes.
    finished = min(longer, key=lambda candidate: (candidate.endswith(_REPLACEMENT), len(candidate)))
    for dropped in range(min(_MAX_PARTIAL, len(ids)) + 1):
        shorter = _decode(tokenizer, ids[: len(ids) - dropped])
        if finished.startswith(shorter):
            return shorter
    return text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
