"""Documents that share a 13-gram of words with an evaluation set, which are then no test of what was learnt from them.

    rule = Contamination.of([EvaluationFile.parse("boolq=boolq/validation.parquet:passage"), ...])
    rule.reason(document)     # "boolq" or None

Texts of a set with fewer words have no such n-gram, and nothing is dropped for them: `summary` counts them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.ngrams import NGRAM, Hashes, ngram_hashes, normalised_words
from megatron_sip.corpus.rules import Document
from megatron_sip.data.corpus_files import digest
from megatron_sip.data.rows import ENDINGS, read_rows
from megatron_sip.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluationFile:
    """A file of the set `name`. field: the one whose text counts (dots lead into objects), None: every text in a row."""

    name: str
    path: Path
    field: str | None = None

    @classmethod
    def parse(cls, given: str) -> Self:
        """From NAME=FILE or NAME=FILE:FIELD. Raises CorpusError."""
        name, _, rest = given.partition("=")
        path, _, field = rest.rpartition(":")
        if Path(rest).is_file() or not path:  # a name may hold a colon
            path, field = rest, ""
        if not name or not Path(path).is_file():
            raise CorpusError(
                f"--decontaminate {given}: expected NAME=FILE or NAME=FILE:FIELD with a file: {ENDINGS}, or .txt, "
                "a text a line"
            )
        return cls(name, Path(path), field or None)

    def texts(self) -> Iterator[str]:
        """Raises DataError for a broken file, and for a row without the field."""
        if self.path.suffix == ".txt":
            yield from self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            return
        for row in read_rows(self.path):
            yield from texts_in(row.values) if self.field is None else [row.text(self.field)]


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


@dataclass(frozen=True, slots=True)
class Contamination:
    """The rule. hashes: uint64 [n-grams], ascending, of all sets; owners: int64 [n-grams], the first set that has it."""

    sets: tuple[str, ...]
    hashes: Hashes
    owners: npt.NDArray[np.int64]
    summary: Mapping[str, Any]
    """JSON: of each set its files with digests, its texts, those too short for an n-gram, and its n-grams."""

    @classmethod
    def of(cls, files: Sequence[EvaluationFile]) -> Self:
        """Raises DataError for a broken file, and for a set none of whose texts is long enough."""
        sets = tuple(dict.fromkeys(file.name for file in files))
        summary: dict[str, dict[str, Any]] = {}
        hashes: list[Hashes] = []
        for name in sets:
            own = [file for file in files if file.name == name]
            found, counts = [], Counter[str]()
            for text in (text for file in own for text in file.texts() if text.strip()):
                found.append(ngram_hashes(normalised_words(text)))
                counts["texts"] += 1
                counts["too_short"] += not len(found[-1])
            if counts["too_short"] == counts["texts"]:
                raise DataError(
                    f"--decontaminate {name}: none of its {counts['texts']} texts has {NGRAM} words: name another field or file"
                )
            if counts["too_short"]:
                log.warning(
                    "--decontaminate %s: %d of its %d texts have fewer than %d words: no document goes for them",
                    *(name, counts["too_short"], counts["texts"], NGRAM),
                )
            hashes.append(np.unique(np.concatenate(found)))
            read = [{"path": str(file.path), "field": file.field, "sha256": digest(file.path)} for file in own]
            summary[name] = {"files": read, **counts, "ngrams": len(hashes[-1])}
        owners = np.repeat(np.arange(len(sets)), [len(own) for own in hashes])
        unique, first = np.unique(np.concatenate(hashes), return_index=True)
        return cls(sets, unique, owners[first], summary)

    @property
    def name(self) -> str:
        return "contaminated"

    def reason(self, document: Document) -> str | None:
        """The set that the document shares an n-gram with, of several the one that was named first."""
        own = ngram_hashes(normalised_words(document.text))
        places = np.minimum(np.searchsorted(self.hashes, own), len(self.hashes) - 1)
        shared = self.owners[places[self.hashes[places] == own]]
        return self.sets[shared.min()] if len(shared) else None
