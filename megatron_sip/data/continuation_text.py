"""Texts and token ids that continue a prefix exactly: of its suffix, of rollouts, of rewrites.

Decoding or encoding piecewise goes wrong at the seams: some tokenizers drop or add a leading space, and a character may
be cut between its bytes, which shows as U+FFFD (with byte fallback for the whole run of byte tokens). Here a seam inside
a character is moved to the character's beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from megatron_sip.records import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_MAX_PARTIAL = 3
"""Bytes, and so at most tokens, of an unfinished UTF-8 character."""
LOOKAHEAD = _MAX_PARTIAL
"""Tokens after the suffix that are enough to finish its last character."""
_SEAM_TOKENS = 8
"""Tokens of a prefix's end that show how it goes on, mostly."""
_LEADS = ("", "\n")
"""What a continuation is encoded after: nothing, or what takes up the space that some tokenizers put before any text."""


@dataclass(frozen=True, slots=True)
class Seam:
    """The end of a prefix: its last tokens, and their text, with which the prefix's text ends.

    unfinished: tokens at the end of `ids` whose last character is not finished, and so is not part of `text`.
    """

    ids: list[int]
    text: str
    unfinished: int = 0


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


def rollout_texts(tokenizer: PreTrainedTokenizerBase, task: Task, rollouts: Sequence[Sequence[int]]) -> list[str]:
    """The texts of continuations of the task's prefix, cut as the suffix's text is: equal ids, equal texts."""
    seam = find_seam(tokenizer, task.prefix_ids, task.prefix_text)
    # What follows the suffix in its document may have told a real U+FFFD at its end from an unfinished character.
    return [task.suffix_text if list(ids) == task.suffix_ids else text_after(tokenizer, seam, ids) for ids in rollouts]


def find_seam(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], prefix_text: str) -> Seam:
    """The seam of a prefix with the text that `continuation_texts` gave it: as few tokens as are sure to decode alike."""
    for starts in _seam_starts(len(prefix)):
        for unfinished, start in product(range(_MAX_PARTIAL + 1), starts):
            ids = prefix[start : len(prefix) - unfinished]
            text = _decode(tokenizer, ids)
            clear = text != "" and _REPLACEMENT not in text and prefix_text.endswith(text)
            if clear or (ids and text == prefix_text):
                return Seam(list(prefix[start:]), text, unfinished)
    return Seam(list(prefix), prefix_text)


def _seam_starts(length: int) -> Iterator[range]:
    """Where to cut a prefix of so many tokens, nearest first: neighbours, of which one begins a character."""
    size = _SEAM_TOKENS
    while size + _MAX_PARTIAL < length:
        yield range(length - size, length - size - _MAX_PARTIAL - 1, -1)
        size *= 2
    yield range(min(_MAX_PARTIAL, length - 1) + 1)


def text_after(tokenizer: PreTrainedTokenizerBase, seam: Seam, ids: Sequence[int]) -> str:
    """The text of `ids` where they follow the seam, without a last character that is cut short.

    After a special token nothing is cut short: a broken character before an EOS stays the U+FFFD that it is.
    """
    both = [*seam.ids, *ids]
    text = _decode(tokenizer, both)
    if text.endswith(_REPLACEMENT) and both[-1] not in tokenizer.all_special_ids:
        shorter = [_decode(tokenizer, both[:-dropped]) for dropped in range(1, _MAX_PARTIAL + 1)]
        whole = [t for t in shorter if t == seam.text or (t.startswith(seam.text) and not t.endswith(_REPLACEMENT))]
        text = whole[0] if whole else text
    if text.startswith(seam.text):
        return text[len(seam.text) :]
    return _decode(tokenizer, ids)  # byte fallback: a broken character after the seam shows as one before it too


def ids_after(tokenizer: PreTrainedTokenizerBase, seam: Seam, text: str) -> list[int] | None:
    """Ids that follow the seam with exactly `text` (as the tokenizer normalises it); None where the seam is inside a
    character that `text` does not finish.

    Special tokens written out in `text` are the plain text that they are in documents.
    """
    head = text[: len(text) - len(text.lstrip()) + 1]  # the seam decides no more; a tokenizer may normalise the rest
    unfinished = seam.ids[len(seam.ids) - seam.unfinished :]
    for lead in _LEADS:
        begun = [*_encode(tokenizer, lead), *unfinished]
        ids = _encode(tokenizer, lead + text)
        rest = ids[len(begun) :]
        if ids[: len(begun)] == begun and text_after(tokenizer, seam, rest).startswith(head):
            return rest
    return None if unfinished else _encode(tokenizer, text)  # text that the tokenizer normalises to other characters


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


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []
