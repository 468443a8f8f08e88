"""Rows of a public data set in a local file: csv with a header, JSON lines, or parquet. What is wrong is named with its row."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.errors import DataError
from megatron_sip.files import described, read_json_lines

ENDINGS = ".csv, .jsonl, .json (one object a line) or .parquet"
LONGEST_CELL = 1 << 27
"""Characters; csv's own limit is shorter than some articles."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row. number: counted from 1, as `where` tells it."""

    path: Path
    number: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}: row {self.number}"

    def text(self, *names: str, empty: bool = False) -> str:
        """The text of the first of these columns that is there; "a.b" is member b of a.

        Raises DataError: none is there, or it is no text, or blank and must not be `empty`.
        """
        for name in names:
            first, *inner = name.split(".")
            if first not in self.values:
                continue
            value = self.values[first]
            for part in inner:
                value = value.get(part) if isinstance(value, Mapping) else None
            if not isinstance(value, str) or not (value.strip() or empty):
                raise DataError(f"{self.where}: column {name!r} must be a text, not empty, found {value!r:.80}")
            return value
        wanted = " or ".join(map(repr, names))
        raise DataError(f"{self.where}: no column {wanted}; found {', '.join(map(repr, self.values)) or 'none'}")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `path` in order. Raises DataError for a file that is none of ENDINGS, broken, or without any row."""
    readers = {".csv": _csv, ".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: give a file that ends with {ENDINGS}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    number = 0
    for number, values in enumerate(reader(path), start=1):
        if not isinstance(values, Mapping):
            raise DataError(f"{path}: row {number} is no object of columns, but {values!r:.80}")
        yield Row(path, number, values)
    if not number:
        raise DataError(f"{path}: no row")


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    with described(path, "a csv file with a header"), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            yield from rows
        except csv.Error as error:
            raise DataError(f"{path}: not a csv file with a header after line {rows.line_num}: {error}") from error


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"["):
        raise DataError(f"{path}: a JSON array: write each of its objects in a line of its own, without the brackets")
    yield from read_json_lines(path, "a JSON object")


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from error
