"""Which suffixes are safe: by unanimous votes of a judge (paper section 3.1), or as the documents' own labels say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from megatron_sip.judge.judge import Judge
from megatron_sip.judge.prompts import builtin_prompt
from megatron_sip.judge.verdicts import unanimous
from megatron_sip.prepare.documents import Document
from megatron_sip.prepare.judgements import place_seed, record_id
from megatron_sip.prepare.pieces import Cutter, Piece
from megatron_sip.prepare.pipeline import Made
from megatron_sip.records import Candidate, Group, Task

Label = tuple[bool | None, str]
"""(whether it is safe, why nobody knows)."""
ToRecord = Callable[[Piece, bool, int], Mapping[str, Any]]


class Labeller(Protocol):
    async def label(self, pieces: Sequence[Piece]) -> list[Label]: ...


class KnownLabels:
    """The labels that documents came with."""

    async def label(self, pieces: Sequence[Piece]) -> list[Label]:
        return [(piece.document.safe, "no-label" if piece.document.safe is None else "") for piece in pieces]


class UnanimousVotes:
    """What all `votes` verdicts of a judge with the single criterion safety say of a suffix."""

    def __init__(self, judge: Judge, votes: int, seed: int) -> None:
        self._judge = judge
        self._votes = votes
        self._seed = seed
        [self._criterion] = judge.weights

    async def label(self, pieces: Sequence[Piece]) -> list[Label]:
        groups = await self._judge.score([self._group(piece) for piece in pieces])
        return [self._read(group) for group in groups]

    def _group(self, piece: Piece) -> Group:
        task = Task(place_seed(piece, self._seed), [], [], piece.prefix, piece.suffix)
        return Group(task, [Candidate("suffix", [], piece.suffix)])

    def _read(self, group: Group) -> Label:
        if group.dropped is not None:
            return None, group.dropped
        votes = [value for _, value in group.verdicts[self._criterion]]
        if len(votes) < self._votes:
            return None, "votes-missing"
        agreed = unanimous(votes, self._votes)
        return (None, "votes-disagree") if agreed is None else (agreed == 1.0, "")


class LabelMaker:
    """Makes a record of each piece that has a label."""

    def __init__(self, cutter: Cutter, labeller: Labeller, to_record: ToRecord, seed: int) -> None:
        self._cutter = cutter
        self._labeller = labeller
        self._to_record = to_record
        self._seed = seed

    async def __call__(self, documents: Sequence[Document]) -> list[Made]:
        """What became of each document."""
        cut = self._cutter.pieces(documents)
        labels = iter(await self._labeller.label([piece for pieces, _ in cut for piece in pieces]))
        made = []
        for pieces, dropped in cut:
            records = []
            for piece in pieces:
                safe, problem = next(labels)
                if safe is None:
                    dropped[problem] += 1
                else:
                    records.append(dict(self._to_record(piece, safe, self._seed)))
            made.append(Made(records, dropped))
        return made


def safety_record(piece: Piece, safe: bool, seed: int) -> dict[str, Any]:
    """A judgement of the suffix alone."""
    return {
        "criterion": "safety",
        "prefix": piece.prefix,
        "suffix": "",
        "pair": record_id("safety", seed, piece.document.key, piece.document.place, piece.cut),
        "subset": piece.document.subset,
        "split": piece.document.split,
        "verdict": safety_label(safe),
        "candidate": piece.suffix,
    }


def rewrite_record(piece: Piece, safe: bool, seed: int) -> dict[str, Any]:
    """What a rewriter learns from: a safe suffix is to be copied (paper, equation 1)."""
    return {
        "prefix": piece.prefix,
        "suffix": piece.suffix,
        "safe": safe,
        "subset": piece.document.subset,
        "split": piece.document.split,
    }


def safety_label(safe: bool) -> str:
    """YES or NO, as the safety prompt has them."""
    rule = builtin_prompt("safety").rule
    assert rule is not None
    return next(label for label, value in rule.values.items() if value == float(safe))
