"""Tasks for evaluation: documents cut once, kept where all votes call the prefix unsafe, or safe (paper, appendix B.1).

OUT/prefixes.jsonl      {"id", "prefix", "suffix", "document", "safe", "subset", "split"}, for `evaluate generate --set`
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megatron_sip.prepare.commands import asked, opened_judge
from megatron_sip.prepare.documents import Document
from megatron_sip.prepare.judgements import record_id
from megatron_sip.prepare.labels import Label, Labeller, UnanimousVotes
from megatron_sip.prepare.pieces import Cutter, Piece
from megatron_sip.prepare.pipeline import Made, document_source, prepare
from megatron_sip.prepare.settings import CutSettings, OutputSettings, ReadSettings, VoteSettings

log = logging.getLogger(__name__)

Keep = Literal["unsafe", "safe", "any"]
KEEPS: tuple[Keep, ...] = ("unsafe", "safe", "any")


@dataclass(frozen=True, slots=True)
class PrefixesWork:
    """samples: how many tasks are wanted. votes: the judge, None with `keep` any, where none is asked."""

    keep: Keep
    samples: int
    reading: ReadSettings
    cutting: CutSettings
    output: OutputSettings
    votes: VoteSettings | None


async def prepare_prefixes(work: PrefixesWork) -> dict[str, Any]:
    """The manifest. Raises PrepareError, DataError, and the judge's errors."""
    cutter, seed = Cutter(work.cutting), work.reading.seed
    made_by = {"cutting": asdict(work.cutting), "seed": seed, "keep": work.keep, "samples": work.samples}
    async with AsyncExitStack() as stack:
        judge = voters = None
        if work.votes is not None:
            judge = await opened_judge(stack, work.votes, work.output)
            voters = UnanimousVotes(judge, work.votes.judge.votes, seed)
            made_by["judge"] = asked(asdict(work.votes.judge))
        make = PrefixMaker(cutter, voters, work.keep, seed)
        source = document_source(work.reading)
        manifest = await prepare(source, work.output, "prefixes", make, made_by, judge, enough=work.samples)
    if (count := manifest["records"]["total"]) < work.samples:
        log.warning("--samples %d: only %d such prefixes in the %s part", work.samples, count, work.reading.split)
    return manifest


class PrefixMaker:
    """Makes a task of each document whose prefix is as wanted."""

    def __init__(self, cutter: Cutter, voters: Labeller | None, keep: Keep, seed: int) -> None:
        self._cutter = cutter
        self._voters = voters
        self._keep = keep
        self._seed = seed

    async def __call__(self, documents: Sequence[Document]) -> list[Made]:
        """What became of each document."""
        cut = self._cutter.pieces(documents)
        labels = iter(await self._labels([piece for pieces, _ in cut for piece in pieces]))
        made = []
        for pieces, dropped in cut:
            records = []
            for piece in pieces:
                safe, problem = next(labels)
                if safe is None and self._voters is not None:
                    dropped[problem] += 1
                elif self._keep != "any" and safe != (self._keep == "safe"):
                    dropped["safe" if safe else "unsafe"] += 1
                else:
                    records.append(task_record(piece, safe, self._seed))
            made.append(Made(records, dropped))
        return made

    async def _labels(self, pieces: Sequence[Piece]) -> Sequence[Label]:
        if self._voters is None:
            return [(None, "")] * len(pieces)
        return await self._voters.label([replace(piece, prefix="", suffix=piece.prefix) for piece in pieces])


def task_record(piece: Piece, safe: bool | None, seed: int) -> dict[str, Any]:
    """document: equal for tasks of equal texts, which are not independent."""
    document = piece.document
    return {
        "id": record_id("prefixes", seed, document.key, document.place, piece.cut),
        "prefix": piece.prefix,
        "suffix": piece.suffix,
        "document": f"{document.key:016x}",
        "safe": safe,
        "subset": document.subset,
        "split": document.split,
    }
