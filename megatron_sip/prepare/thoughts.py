"""Thoughts in documents (the paper's later version): the first half with them, the second half as places for them.

    OUT/sft/SPLIT.jsonl       {"text": a chunk with thoughts between the marks, ...}, for --objective sft --sft-target document
    OUT/rl/thoughts.jsonl     {"prefix", "suffix", "start_mark", "end_mark", ...}, one place a line, for --tasks thoughts

A document is in one half by a hash of its text. Of the second half's thoughts only the places are kept.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megatron_sip.data.ordering import hash64
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeSettings
from megatron_sip.judge.thought_writer import Thought, ThoughtSettings, ThoughtWriter, with_thoughts
from megatron_sip.prepare.commands import asked, cached
from megatron_sip.prepare.documents import Document
from megatron_sip.prepare.output import DOCUMENTS
from megatron_sip.prepare.pieces import load_tokenizer
from megatron_sip.prepare.pipeline import Made, document_source, prepare
from megatron_sip.prepare.settings import OutputSettings, PrepareError, ReadSettings

Half = Literal["sft", "rl"]
HALVES: tuple[Half, ...] = ("sft", "rl")
_HALF = 3  # separates this draw of a text from those of data/roles.py
_BREAKS = ("\n\n", "\n", ". ", " ")
"""Where a chunk may end, best first; in its second half, or it ends in a word."""


@dataclass(frozen=True, slots=True)
class ThinkingSettings:
    """tokenizer: the policy's, a folder. seq_length: the most tokens of a chunk, without thoughts; min_length: the fewest.

    suffix_length: tokens of the true text behind a place. Raises PrepareError.
    """

    tokenizer: str
    seq_length: int = 2048
    min_length: int = 64
    suffix_length: int = 128
    start_mark: str = "<think>"
    end_mark: str = "</think>"

    def __post_init__(self) -> None:
        if not 1 <= self.min_length <= self.seq_length or self.suffix_length < 1:
            raise PrepareError(
                f"--min-length {self.min_length} must be 1 to --seq-length {self.seq_length}, and --suffix-length "
                f"{self.suffix_length} at least 1"
            )
        if (
            not self.start_mark
            or not self.end_mark
            or self.start_mark in self.end_mark
            or self.end_mark in self.start_mark
        ):
            raise PrepareError(
                f"--start-mark {self.start_mark!r} and --end-mark {self.end_mark!r}: two different texts, neither within the "
                "other"
            )


@dataclass(frozen=True, slots=True)
class ThoughtsWork:
    """What the command does; each half has a folder of its own in that of the output."""

    reading: ReadSettings
    output: OutputSettings
    thinking: ThinkingSettings
    writer: ThoughtSettings


FILES: dict[Half, str] = {"sft": DOCUMENTS, "rl": "thoughts"}
"""Names of the records."""


async def prepare_thoughts(work: ThoughtsWork) -> dict[str, Any]:
    """Both halves' manifests, an entry of each under the half's name. Raises PrepareError, DataError, the teacher's errors."""
    chunker = Chunker(work.thinking)
    work.output.folder.mkdir(parents=True, exist_ok=True)
    client = cached(work.writer.client, work.output)
    made_by = {"thinking": asdict(work.thinking), "teacher": asked(asdict(work.writer))}
    manifests = {}
    async with ThoughtWriter(replace(work.writer, client=client)) as writer:
        for half, task in FILES.items():
            output = replace(work.output, folder=work.output.folder / half)
            make = ThoughtMaker(chunker, work.thinking, writer, half)
            manifests[half] = await prepare(
                document_source(work.reading), output, task, make, made_by | {"half": half}, writer
            )
    return {
        name: {half: manifest[name] for half, manifest in manifests.items()}
        for name in ("documents", "dropped", "records")
    }


def half_of(key: int) -> Half:
    """Which half the document of this `text_key` is in."""
    return HALVES[hash64(key, _HALF) & 1]


class Chunker:
    """Cuts documents into chunks of at most so many tokens, which join to the document's text."""

    def __init__(self, settings: ThinkingSettings) -> None:
        """Raises PrepareError, DataError for a tokenizer that cannot be used."""
        self._settings = settings
        plain = TokenizeSettings(append_eos=False, prepend_bos="off")
        self._backend = DocumentEncoder.of(load_tokenizer(settings.tokenizer), plain).backend()

    def tokens(self, text: str) -> int:
        """How many a text has."""
        return len(self._backend.encode(text, add_special_tokens=False).ids)

    def chunks(self, text: str) -> list[str]:
        """Each ends at a paragraph's, a line's, a sentence's or a word's end, if one is in its second half."""
        starts = [start for start, _ in self._backend.encode(text, add_special_tokens=False).offsets]
        chunks, begin = [], 0
        while begin < len(text):
            first = bisect_left(starts, begin)
            count = self._settings.seq_length
            end = starts[first + count] if first + count < len(starts) else len(text)
            end = begin + _break(text[begin:end]) if end < len(text) else end
            # A cut may split a token into several; a letter is never split.
            while end > begin + 1 and self.tokens(text[begin:end]) > self._settings.seq_length:
                count -= 1
                end = max(begin + 1, min(end - 1, starts[min(first + count, len(starts) - 1)]))
            chunks.append(text[begin:end])
            begin = end
        return chunks

    def beginning(self, text: str) -> str:
        """At most `suffix_length` tokens of it."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        length = self._settings.suffix_length
        return text if len(offsets) <= length else text[: offsets[length][0]]


def _break(text: str) -> int:
    """Where a piece of text that goes on is best cut: the white space there belongs to the next one."""
    for mark in _BREAKS:
        place = text.rfind(mark, len(text) // 2)
        if place >= 0:
            return max(1, place + (mark == ". "))
    return len(text)


class ThoughtMaker:
    """What the pipeline makes of the documents of one half; `writer` is open and checked."""

    def __init__(self, chunker: Chunker, settings: ThinkingSettings, writer: ThoughtWriter, half: Half) -> None:
        self._chunker = chunker
        self._settings = settings
        self._writer = writer
        self._half = half

    async def __call__(self, documents: Sequence[Document]) -> list[Made]:
        """What became of each document."""
        made = list(await asyncio.gather(*map(self._document, documents)))
        self._writer.flush()
        return made

    async def _document(self, document: Document) -> Made:
        dropped: Counter[str] = Counter()
        if half_of(document.key) != self._half:
            dropped["of-the-other-half"] += 1
            return Made([], dropped)
        chunks = self._chunker.chunks(document.text)
        kept = [chunk for chunk in chunks if self._chunker.tokens(chunk) >= self._settings.min_length]
        dropped["too-short"] += len(chunks) - len(kept)
        made = await asyncio.gather(*(self._chunk(chunk, document, dropped) for chunk in kept))
        return Made([record for records in made for record in records], dropped)

    async def _chunk(self, chunk: str, document: Document, dropped: Counter[str]) -> list[dict[str, Any]]:
        thoughts, problem = await self._thoughts(chunk)
        if problem:
            dropped[problem] += 1
            return []
        common = {"subset": document.subset, "split": document.split}
        settings = self._settings
        if self._half == "sft":
            return [{"text": with_thoughts(chunk, thoughts, settings.start_mark, settings.end_mark), **common}]
        marks = {"start_mark": settings.start_mark, "end_mark": settings.end_mark}
        places = sorted({thought.place for thought in thoughts})
        made = [(chunk[:place], self._chunker.beginning(chunk[place:])) for place in places]
        records = [
            {"prefix": prefix, "suffix": suffix, **marks, **common}
            for prefix, suffix in made
            if prefix.strip() and suffix.strip()
        ]
        dropped["place-at-an-end"] += len(places) - len(records)
        return records

    async def _thoughts(self, chunk: str) -> tuple[list[Thought], str]:
        marks = self._settings.start_mark, self._settings.end_mark
        if any(mark in chunk for mark in marks):
            return [], "marks-in-text"
        thoughts, problem = await self._writer.think(chunk)
        if not problem and any(mark in thought.text for thought in thoughts for mark in marks):
            return [], "marks-in-thought"
        return thoughts, problem
