"""Shards of raw corpora, read row by row with flat memory: any JSON lines or parquet, and RedPajama-V2 in both its layouts.

    documents/2023-06/0000/en_head.json.gz                {"raw_content", "url", ...}
    quality_signals/2023-06/0000/en_head.signals.json.gz  {"id": "2023-06/0000/en_head.json.gz/0", "quality_signals", ...}

The number that ends an id is the row of its document, from 0; a row that RedPajama's own program could not read has no signals.
As a record of the hub, a document holds `doc_id` and its signals, a JSON string, itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import orjson

from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.rules import Document
from megatron_sip.data.text_sources import (
    MAX_DOCUMENT_BYTES,
    PARQUET_SUFFIX,
    numbered_lines,
    parquet_batches,
    source_suffix,
    stem_of,
)
from megatron_sip.errors import DataError
from megatron_sip.files import described

SIGNALS, DOC_ID = "quality_signals", "doc_id"


@dataclass(frozen=True, slots=True)
class Fields:
    """Where records hold what; dots lead into objects. id: None for the place of the record, or what RedPajama calls it.
    subset: None for the name of the file (of RedPajama's, such as en_head). signals: whether documents come with RedPajama's.
    redpajama: whether records may hold its ids.
    """

    text: str
    id: str | None = None
    subset: str | None = None
    signals: bool = False
    redpajama: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of documents, and the one of their signals where that is a file of its own.

    name: what its output is called. place: its path behind the folder `documents`, or behind what all files share, which no
    other shard has: how ids begin.
    """

    name: str
    path: Path
    place: str
    signals: Path | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that are read."""
        return (self.path,) if self.signals is None else (self.path, self.signals)


class RestOfShardError(DataError):
    """Of a row that may be right, but of a shard whose signals cannot be read any further."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a row: a document, or why it is none. position: bytes of the shard's file that were read so far."""

    found: Document | DataError
    position: int


def shards_in(paths: tuple[Path, ...], fields: Fields) -> tuple[Shard, ...]:
    """The shards of files, in order. Raises CorpusError for files of RedPajama's without signals, DataError."""
    width = len(str(len(paths) - 1))
    return tuple(
        Shard(f"{number:0{width}d}-{stem_of(path)}", path, place, _signals_of(path, fields) if fields.signals else None)
        for number, (path, place) in enumerate(zip(paths, _places(paths), strict=True))
    )


def read_shard(shard: Shard, fields: Fields) -> Iterator[Row]:
    """The rows of a shard that are not blank, in order. Where its signals end too early, or are not of its documents, what is
    left of the rows is RestOfShardError.

    Raises DataError where no more documents can be read: a file that is cut short, or ends before its signals.
    """
    signals = None if shard.signals is None else _SignalRows(shard.path, _behind_documents(shard.path), shard.signals)
    broken: RestOfShardError | None = None
    for number, record, position in _records(shard.path, fields):
        beside: _Signals | DataError | None = None
        if signals is not None and broken is None:
            try:
                beside = signals.of(number, record)
            except DataError as error:
                broken = RestOfShardError(str(error))
        found: Document | DataError
        if (
            wrong := next((each for each in (broken, record, beside) if isinstance(each, DataError)), None)
        ) is not None:
            found = wrong
        else:
            found = _document(shard, fields, number, cast("Mapping[str, Any]", record), cast("_Signals | None", beside))
        yield Row(found, position)
    if signals is not None and broken is None:
        signals.end()


def _places(paths: tuple[Path, ...]) -> list[str]:
    """Of each file a path that no other has."""
    places = [_behind_documents(path) for path in paths]
    if None not in places and len({*places}) == len(paths):
        return [str(place) for place in places]
    shared = Path(os.path.commonpath([path.parent for path in paths])).parent
    return [path.relative_to(shared).as_posix() for path in paths]


def _behind_documents(path: Path) -> str | None:
    folders = path.parts[:-1]
    if "documents" not in folders:
        return None
    return "/".join(path.parts[len(folders) - folders[::-1].index("documents") :])


def _signals_of(path: Path, fields: Fields) -> Path | None:
    """The file with the signals; None for records that hold their own, and where none can be read. Raises CorpusError where
    neither is there."""
    place = _behind_documents(path)
    top = path.parent if place is None else path.parents[place.count("/")]
    beside = top.parent / SIGNALS / Path(place or path.name).with_name(f"{stem_of(path)}.signals{source_suffix(path)}")
    if place is not None and beside.is_file():
        return beside
    try:
        first = next((record for _, record, _ in _records(path, fields)), None)
    except DataError:
        return None  # to be told, or counted, when the shard is made
    if isinstance(first, Mapping) and SIGNALS not in first:
        raise CorpusError(
            f"{path}: its documents come without signals: there is neither a file {beside} nor a field {SIGNALS!r} in its "
            "first record: fetch that file, or give --keep all, which needs none"
        )
    return None


def _records(path: Path, fields: Fields) -> Iterator[tuple[int, Mapping[str, Any] | DataError, int]]:
    """Row, from 0, record or what is wrong with it, and how far the file has been read."""
    if source_suffix(path) == PARQUET_SUFFIX:
        yield from _parquet_records(path, fields)
        return
    for line_number, line, position in numbered_lines(path):
        found: Mapping[str, Any] | DataError
        try:
            with described(f"{path}:{line_number}", "a JSON object"):
                found = _object(orjson.loads(line))
        except DataError as error:
            found = error
        yield line_number - 1, found, position


def _parquet_records(path: Path, fields: Fields) -> Iterator[tuple[int, Mapping[str, Any] | DataError, int]]:
    """Raises DataError also where the column of the text is missing: of every row it then is."""
    wanted = [name for name in (fields.text, fields.id, fields.subset) if name is not None]

    def columns(schema: Any) -> list[str]:
        names = {name if name in schema.names else name.split(".")[0] for name in (*wanted, DOC_ID, SIGNALS, "url")}
        if not names.intersection((fields.text, fields.text.split(".")[0])).intersection(schema.names):
            raise DataError(f"{path}: no column {fields.text!r}; it has {', '.join(schema.names[:20])}")
        return [name for name in schema.names if name in names]

    number = 0
    for batch, position in parquet_batches(path, columns):
        for place in range(batch.num_rows):
            found: Mapping[str, Any] | DataError
            try:
                with described(f"{path}: row {number + 1}", "text in UTF-8"):
                    found = {name: batch.column(name)[place].as_py() for name in batch.schema.names}
            except DataError as error:
                found = error
            yield number, found, position
            number += 1


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"found {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class _Signals:
    """Of the document in row `number`: its id, its page, and its signals."""

    number: int
    id: str
    url: str | None
    signals: Mapping[str, Any]
    where: str


class _SignalRows:
    """The file beside the documents, read in step with it."""

    def __init__(self, documents: Path, place: str | None, path: Path) -> None:
        self._documents, self._place, self._path = documents, PurePosixPath(place or documents), path
        self._lines = numbered_lines(path)
        self._next: _Signals | DataError | None = None

    def _peek(self) -> _Signals | DataError | None:
        """The next row, or what is wrong with it; None at the end. Raises DataError."""
        if self._next is None and (found := next(self._lines, None)) is not None:
            try:
                self._next = self._signals(f"{self._path}:{found[0]}", found[1])
            except DataError as error:
                self._next = error
        if isinstance(self._next, _Signals) and not self._is_own(self._next):
            raise DataError(
                f"{self._next.where}: the id {self._next.id!r} is of another file than {self._documents}: fetch both anew"
            )
        return self._next

    def _is_own(self, found: _Signals) -> bool:
        parts, own = PurePosixPath(found.id).parts[:-1], self._place.parts
        shared = min(len(parts), len(own))
        return parts[-shared:] == own[-shared:]

    def _signals(self, where: str, line: bytes) -> _Signals:
        with described(where, "a row of quality signals"):
            row = orjson.loads(line)
            number = int(row["id"].rpartition("/")[2])
            return _Signals(
                number, row["id"], (row.get("metadata") or {}).get("url"), _object(row[SIGNALS] or {}), where
            )

    def of(self, number: int, record: Mapping[str, Any] | DataError) -> _Signals | DataError | None:
        """Those of the document in a row; None where the next ones are of a later row or none are left; what is wrong with
        their row. Raises DataError."""
        found, where = self._peek(), f"{self._documents}:{number + 1}"
        if isinstance(found, DataError):  # whose it is, is not known: most likely of this document
            self._next = None
            return found
        if found is None or found.number > number:
            return None
        url = record.get("url") if isinstance(record, Mapping) else None
        if found.number < number or (url is not None and found.url is not None and url != found.url):
            raise DataError(
                f"{self._path}: the signals {found.id!r} are not those of {where} ({found.url} there, {url} here): the two "
                "files are not of each other; fetch both anew"
            )
        self._next = None
        return found

    def end(self) -> None:
        """Raises DataError where signals are left."""
        if (left := self._peek()) is not None:
            name = left.id if isinstance(left, _Signals) else str(left)
            raise DataError(f"{self._documents}: ends before the document of the signals {name!r} in {self._path}")


def _document(
    shard: Shard, fields: Fields, number: int, record: Mapping[str, Any], beside: _Signals | None
) -> Document | DataError:
    where = f"{shard.path}:{number + 1}"
    try:
        text = _value(record, fields.text, where)
        if not isinstance(text, str):
            raise DataError(f"{where}: the field {fields.text!r} holds no text: {type(text).__name__}")
        if len(text) > MAX_DOCUMENT_BYTES:
            raise DataError(f"{where}: {len(text)} characters; a document this large is better cut into several")
        own = record.get(DOC_ID) if beside is None and fields.redpajama else beside and beside.id
        name = _word(record, fields.id, where) if fields.id else str(own or f"{shard.place}/{number}")
        file = Path(name).parent
        subset = stem_of(file if own and not fields.id and source_suffix(file) else shard.path)
        if fields.subset is not None:
            subset = _word(record, fields.subset, where)
        return Document(name, text, subset, _signals(shard, record, beside, where) if fields.signals else None)
    except DataError as error:
        return error


def _signals(shard: Shard, record: Mapping[str, Any], beside: _Signals | None, where: str) -> Mapping[str, Any]:
    if shard.signals is not None:
        return beside.signals if beside is not None else {}
    with described(where, f"a record with {SIGNALS!r}"):
        own = record.get(SIGNALS) or {}
        return _object((orjson.loads(own) or {}) if isinstance(own, str) else own)


def _word(record: Mapping[str, Any], name: str, where: str) -> str:
    value = _value(record, name, where)
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}: the field {name!r} holds neither text nor a number: {type(value).__name__}")
    return str(value)


def _value(record: Mapping[str, Any], name: str, where: str) -> Any:
    """What a field holds; an object on the way may be spelt as a JSON string."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        with described(where, f"a record with the field {name!r}; it has {', '.join(sorted(record))}"):
            value = (orjson.loads(value) if isinstance(value, str) else value)[part]
    return value
