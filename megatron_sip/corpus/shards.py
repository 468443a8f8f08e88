"""Shards of raw corpora, read row by row with flat memory: any JSON lines or parquet, and RedPajama-V2 in both its layouts.

    documents/2023-06/0000/en_head.json.gz                {"raw_content", "url", ...}
    quality_signals/2023-06/0000/en_head.signals.json.gz  {"id": "2023-06/0000/en_head.json.gz/0", "quality_signals", ...}

The number that ends an id is the row of its document, from 0; a row that RedPajama's own program could not read has no signals.
As a record of the hub, a document holds `doc_id` and its signals, a JSON string, itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.rules import Document
from megatron_sip.data.text_sources import PARQUET_SUFFIX, numbered_lines, read_records, source_suffix
from megatron_sip.errors import DataError
from megatron_sip.files import described

SIGNALS, DOC_ID = "quality_signals", "doc_id"


@dataclass(frozen=True, slots=True)
class Fields:
    """Where records hold what; dots lead into objects. id: None for the place of the record, or what RedPajama calls it.
    subset: None for the name of the file (of RedPajama's, such as en_head). signals: whether documents come with RedPajama's.
    """

    text: str
    id: str | None = None
    subset: str | None = None
    signals: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of documents, and the one of their signals where that is a file of its own.

    name: what its output is called. place: its path behind the folder `documents`, or its folder and name: how ids begin.
    """

    name: str
    path: Path
    place: str
    signals: Path | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that are read."""
        return (self.path,) if self.signals is None else (self.path, self.signals)


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a row: a document, or why it is none. position: bytes of the shard's file that were read so far."""

    found: Document | DataError
    position: int


def shards_in(paths: tuple[Path, ...], fields: Fields) -> tuple[Shard, ...]:
    """The shards of files, in order. Raises CorpusError for files of RedPajama's without signals, DataError."""
    width = len(str(len(paths) - 1))
    places = [_place(path) for path in paths]
    return tuple(
        Shard(
            f"{number:0{width}d}-{_stem(path.name)}", path, place, _signals_of(path, place) if fields.signals else None
        )
        for number, (path, place) in enumerate(zip(paths, places, strict=True))
    )


def read_shard(shard: Shard, fields: Fields) -> Iterator[Row]:
    """The rows of a shard that are not blank, in order.

    Raises DataError where nothing more can be read of it: a file that is cut short, two files that are not of each other.
    """
    signals = None if shard.signals is None else _SignalRows(shard.path, shard.place, shard.signals)
    for number, record, position in _records(shard.path, fields):
        beside = None if signals is None else signals.of(number, record)
        yield Row(
            record if isinstance(record, DataError) else _document(shard, fields, number, record, beside), position
        )
    if signals is not None:
        signals.end()


def _stem(name: str) -> str:
    return name[: len(name) - len(source_suffix(Path(name)))]


def _place(path: Path) -> str:
    folders = path.parts[:-1]
    start = len(folders) - (folders[::-1].index("documents") if "documents" in folders else 1)
    return "/".join(path.parts[start:])


def _signals_of(path: Path, place: str) -> Path | None:
    """The file with the signals; None for records that hold their own. Raises CorpusError where neither is there."""
    top, suffix = path.parents[place.count("/")], source_suffix(path)
    beside = top.parent / SIGNALS / f"{_stem(place)}.signals{suffix}"
    if top.name == "documents" and beside.is_file():
        return beside
    first = next((record for _, record, _ in _records(path, Fields("raw_content"))), None)
    if isinstance(first, Mapping) and SIGNALS not in first:
        raise CorpusError(
            f"{path}: its documents come without signals: there is neither a file {beside} nor a field {SIGNALS!r} in its "
            "first record: fetch that file, or give --keep all, which needs none"
        )
    return None


def _records(path: Path, fields: Fields) -> Iterator[tuple[int, Mapping[str, Any] | DataError, int]]:
    """Row, from 0, record or what is wrong with it, and how far the file has been read."""
    if source_suffix(path) == PARQUET_SUFFIX:
        others = [name.split(".")[0] for name in (fields.id, fields.subset) if name is not None]
        first = 0
        for batch in read_records(path, fields.text, (*others, DOC_ID, SIGNALS)):
            yield from ((first + number, record, batch.position) for number, record in enumerate(batch.records))
            first += len(batch.records)
        return
    for line_number, line, position in numbered_lines(path):
        found: Mapping[str, Any] | DataError
        try:
            with described(f"{path}:{line_number}", "a JSON object"):
                found = dict(orjson.loads(line))
        except DataError as error:
            found = error
        yield line_number - 1, found, position


@dataclass(frozen=True, slots=True)
class _Signals:
    """Of the document in row `number`: its id, its page, and its signals."""

    number: int
    id: str
    url: str | None
    signals: Mapping[str, Any]


class _SignalRows:
    """The file beside the documents, read in step with it."""

    def __init__(self, documents: Path, place: str, path: Path) -> None:
        self._documents, self._place, self._path = documents, PurePosixPath(place), path
        self._lines = numbered_lines(path)
        self._next = self._read()

    def _read(self) -> _Signals | None:
        for line_number, line, _ in self._lines:
            where = f"{self._path}:{line_number}"
            with described(where, "a row of quality signals"):
                row = orjson.loads(line)
                file, _, number = row["id"].rpartition("/")
                parts, own = PurePosixPath(file).parts, self._place.parts
                shared = min(len(parts), len(own))
                if parts[-shared:] != own[-shared:]:
                    raise DataError(
                        f"{where}: the id {row['id']!r} is of another file than {self._documents}: fetch both anew"
                    )
                return _Signals(int(number), row["id"], (row.get("metadata") or {}).get("url"), row[SIGNALS])
        return None

    def of(self, number: int, record: Mapping[str, Any] | DataError) -> _Signals | None:
        """Those of the document in a row; None where the next ones are of a later row. Raises DataError."""
        found, where = self._next, f"{self._documents}:{number + 1}"
        if found is None:
            raise DataError(
                f"{self._path}: ends before the signals of {where}: cut short, or not of that file; fetch both anew"
            )
        if found.number > number:
            return None
        url = record.get("url") if isinstance(record, Mapping) else None
        if found.number < number or (url is not None and found.url is not None and url != found.url):
            raise DataError(
                f"{self._path}: the signals {found.id!r} are not those of {where} ({found.url} there, {url} here): the two "
                "files are not of each other; fetch both anew"
            )
        self._next = self._read()
        return found

    def end(self) -> None:
        """Raises DataError where signals are left."""
        if self._next is not None:
            raise DataError(
                f"{self._documents}: ends before the document of the signals {self._next.id!r} in {self._path}"
            )


def _document(
    shard: Shard, fields: Fields, number: int, record: Mapping[str, Any], beside: _Signals | None
) -> Document | DataError:
    where = f"{shard.path}:{number + 1}"
    try:
        text = _value(record, fields.text, where)
        if not isinstance(text, str):
            raise DataError(f"{where}: the field {fields.text!r} holds no text: {type(text).__name__}")
        own = record.get(DOC_ID) if beside is None else beside.id
        name = str(_value(record, fields.id, where)) if fields.id else str(own or f"{shard.place}/{number}")
        file = PurePosixPath(name).parent.name
        subset = _stem(file if source_suffix(Path(file)) else shard.path.name)
        if fields.subset is not None:
            subset = str(_value(record, fields.subset, where))
        return Document(name, text, subset, _signals(shard, record, beside, where) if fields.signals else None)
    except DataError as error:
        return error


def _signals(shard: Shard, record: Mapping[str, Any], beside: _Signals | None, where: str) -> Mapping[str, Any]:
    if shard.signals is not None:
        return beside.signals if beside is not None else {}
    with described(where, f"a record with {SIGNALS!r}"):
        own = record.get(SIGNALS) or {}
        return dict(orjson.loads(own) if isinstance(own, str) else own)


def _value(record: Mapping[str, Any], name: str, where: str) -> Any:
    """What a field holds; an object on the way may be spelt as a JSON string."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        with described(where, f"a record with the field {name!r}; it has {', '.join(sorted(record))}"):
            value = (orjson.loads(value) if isinstance(value, str) else value)[part]
    return value
