"""Documents cut into a prefix and a suffix, at the places where the trainer would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sip.data.continuation_text import LOOKAHEAD, continuation_texts
from megatron_sip.data.ordering import uniform_below
from megatron_sip.data.tasks import TaskSettings
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeSettings
from megatron_sip.prepare.documents import Document
from megatron_sip.prepare.settings import CutSettings, PrepareError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Piece:
    """A document cut at token `cut`: the texts before and after it, which join to the document's."""

    document: Document
    cut: int
    prefix: str
    suffix: str


class Cutter:
    """Cuts documents; `dropped` of `pieces` counts those that are too short and suffixes of white space alone."""

    def __init__(self, settings: CutSettings) -> None:
        """Raises PrepareError, DataError for a tokenizer that cannot be used."""
        self._tasks = settings.tasks
        self._whole = settings.whole or settings.tokenizer is None
        self.tokenizer = None if settings.tokenizer is None else load_tokenizer(settings.tokenizer)
        plain = TokenizeSettings(append_eos=False, prepend_bos="off")
        self._backend = None if self.tokenizer is None else DocumentEncoder.of(self.tokenizer, plain).backend()

    def pieces(self, documents: Sequence[Document]) -> list[tuple[list[Piece], Counter[str]]]:
        """Of each document its pieces, and what was dropped of it."""
        if self._whole or self._backend is None:
            return [([Piece(document, 0, document.prefix, document.text)], Counter()) for document in documents]
        encodings = self._backend.encode_batch_fast([d.text for d in documents], add_special_tokens=False)
        return [self._cut(document, encoding.ids) for document, encoding in zip(documents, encodings, strict=True)]

    def cut_to_suffix(self, text: str, suffix: str) -> str:
        """At most as many tokens of a text as a suffix has, so that it breaks off as one; all of it without a tokenizer."""
        if self._backend is None or self.tokenizer is None:
            return text
        ids = self._backend.encode(text, add_special_tokens=False).ids
        end = self._tasks.suffix_length
        if self._whole:
            end = len(self._backend.encode(suffix, add_special_tokens=False).ids)
        if len(ids) <= end:
            return text
        return continuation_texts(self.tokenizer, ids[:end], ids[end : end + LOOKAHEAD])[0]

    def _cut(self, document: Document, ids: list[int]) -> tuple[list[Piece], Counter[str]]:
        pieces, dropped = [], Counter[str]()
        cuts = cuts_of(len(ids), document.key, self._tasks)
        if not cuts:
            dropped["too-short"] += 1
        for cut in cuts:
            start, end = self._tasks.window(cut)
            texts = continuation_texts(
                self.tokenizer,
                ids[start:cut],
                ids[cut:end],
                ids[end : end + LOOKAHEAD],
                cut_before=start > 0,
            )
            if texts[1].strip():
                pieces.append(Piece(document, cut, *texts))
            else:
                dropped["blank-suffix"] += 1
        return pieces, dropped


def cuts_of(length: int, key: int, settings: TaskSettings) -> list[int]:
    """The tokens at which a document of `length` tokens is cut: one that its key and the seed draw, or every chunk's first."""
    first = settings.first_cut(bos=False)
    last = length - settings.suffix_length
    if last < first:
        return []
    if settings.mode == "stream":
        return list(range(first, last + 1, settings.suffix_length))
    return [first + uniform_below(last - first + 1, settings.seed, key)]


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Raises PrepareError where there is no tokenizer."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():  # a name of the hub's would be looked for there, for a minute without a network
        raise PrepareError(f"--tokenizer {folder}: there is no such folder; name one that holds a tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise PrepareError(f"--tokenizer {folder}: no tokenizer can be loaded from there: {error}") from error
