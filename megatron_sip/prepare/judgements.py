"""Labelled judgements: what a judge learns from (paper section 3.1).

Quality: a suffix and a spoilt version of it make two records, one for each order, whose right verdict is the original's label.
Safety: a suffix whose verdicts agree, or whose label is known, makes one.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import orjson

from megatron_sip.data.ordering import hash64
from megatron_sip.judge.corruption import Corruptor
from megatron_sip.prepare.documents import Document
from megatron_sip.prepare.pieces import Cutter, Piece
from megatron_sip.prepare.pipeline import Made
from megatron_sip.prepare.rules import same, spoil
from megatron_sip.prepare.settings import QualitySettings

TEACHER = "teacher"
"""Stands among the rules for a post-trained model."""
_SPACES = re.compile(r"(?<=\S)[^\S\n]{2,}(?=\S)")
_RULE = 1  # separates the draws of a seed


class QualityMaker:
    """Makes pairs. `corruptor` is open and checked where the settings ask for a teacher."""

    def __init__(self, cutter: Cutter, settings: QualitySettings, corruptor: Corruptor | None = None) -> None:
        self._cutter = cutter
        self._settings = settings
        self._corruptor = corruptor

    async def __call__(self, documents: Sequence[Document]) -> list[Made]:
        """What became of each document."""
        made = list(await asyncio.gather(*(self._document(*cut) for cut in self._cutter.pieces(documents))))
        if self._corruptor is not None:
            self._corruptor.flush()
        return made

    async def _document(self, pieces: list[Piece], dropped: Counter[str]) -> Made:
        pairs = await asyncio.gather(*(self._pair(piece, dropped) for piece in pieces))
        return Made([record for pair in pairs for record in pair], dropped)

    async def _pair(self, piece: Piece, dropped: Counter[str]) -> list[dict[str, Any]]:
        """The two records of a piece; none where every rule failed, which is counted."""
        for rule in rules_for(piece, self._settings):
            spoilt, problem = await self._spoilt(rule, piece)
            if not problem:
                shown = evenly_spaced(piece) if rule == TEACHER else piece
                return pair_records(shown, spoilt, rule, self._settings)
            dropped[f"{rule}/{problem}"] += 1
        dropped["no-rule-applies"] += 1
        return []

    async def _spoilt(self, rule: str, piece: Piece) -> tuple[str, str]:
        """(spoilt suffix, "") or ("", why there is none)."""
        if rule != TEACHER:
            spoilt = spoil(rule, piece.suffix, piece.prefix, place_seed(piece, self._settings.seed))
            return (spoilt, "") if spoilt is not None else ("", "cannot-change")
        assert self._corruptor is not None
        spoilt, problem = await self._corruptor.corrupt(piece.prefix, piece.suffix)
        if problem:
            return "", problem
        spoilt = spaced_as(self._cutter.cut_to_suffix(spoilt, piece.suffix), piece.suffix)
        return (spoilt, "") if not same(spoilt, piece.suffix) else ("", "unchanged")


def spaced_as(spoilt: str, original: str) -> str:
    """A spoilt version with the white space around it that the original has, and single spaces inside its lines: a judge is
    not to go by what a model that copies leaves out."""
    body, bare = original.strip(), _SPACES.sub(" ", spoilt.strip())
    before, _, behind = original.partition(body) if body else (original, "", "")
    return before + bare + behind


def evenly_spaced(piece: Piece) -> Piece:
    """A piece whose suffix has single spaces inside its lines, as spoilt versions by a model have."""
    return replace(piece, suffix=spaced_as(piece.suffix, piece.suffix))


def place_seed(piece: Piece, seed: int) -> int:
    """For draws about one place of a document."""
    return hash64(seed, piece.document.key, *piece.document.place, piece.cut)


def rules_for(piece: Piece, settings: QualitySettings) -> list[str]:
    """The rules in the drawn order in which they are tried on a piece."""
    draws = Random(hash64(place_seed(piece, settings.seed), _RULE))
    return draws.sample(settings.rules, len(settings.rules))


def pair_records(piece: Piece, spoilt: str, rule: str, settings: QualitySettings) -> list[dict[str, Any]]:
    """The records of an original and a spoilt suffix: original as option 1, then as option 2."""
    pair = record_id("quality", settings.seed, piece.document.key, piece.document.place, piece.cut, rule)
    common = {
        "criterion": settings.criterion,
        "prefix": piece.prefix,
        "suffix": piece.suffix,
        "pair": pair,
        "subset": f"{piece.document.subset}/{rule}",
        "split": piece.document.split,
    }
    return [
        common | {"verdict": "1", "option_1": piece.suffix, "option_2": spoilt},
        common | {"verdict": "2", "option_1": spoilt, "option_2": piece.suffix},
    ]


def record_id(*parts: Any) -> str:
    """16 hex digits of a hash of `parts`."""
    return hashlib.blake2b(orjson.dumps(parts), digest_size=8).hexdigest()
