"""Readers of text documents: JSON lines (plain, .gz, .zst) and parquet.

Each yields batches of texts with the position reached in the file, so that the caller can show progress and tokenise
batch by batch with flat memory. A file that is broken anywhere raises a `DataError` naming file, line and mend.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_sip.data.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSION_SUFFIXES = (".gz", ".zst")
PARQUET_SUFFIX = ".parquet"
SUPPORTED = ".jsonl, .ndjson, .json (one object a line), each also .gz or .zst, and .parquet"

_BATCH_CHARACTERS = 2_000_000
_BATCH_DOCUMENTS = 1_000
_EXCERPT = 80


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts in file order; `position` is how far the file has been read, in bytes of the file on disk."""

    texts: list[str]
    position: int


def is_text_source(path: Path) -> bool:
    """Whether the name ends like a format that `read_texts` reads."""
    name = path.name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(JSON_SUFFIXES) or path.name.lower().endswith(PARQUET_SUFFIX)


def read_texts(path: Path, text_field: str) -> Iterator[TextBatch]:
    """Every document's text in file order, empty ones included.

    Raises `DataError` on a broken line, a missing or non-string text field, or a truncated file.
    """
    is_parquet = path.suffix.lower() == PARQUET_SUFFIX
    documents = _parquet_texts(path, text_field) if is_parquet else _json_texts(path, text_field)
    texts: list[str] = []
    characters = position = 0
    for text, position in documents:
        texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
            yield TextBatch(texts, position)
            texts, characters = [], 0
    yield TextBatch(texts, max(position, path.stat().st_size))


def _json_texts(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    with path.open("rb") as raw:
        line_number = 0
        try:
            for line_number, line in enumerate(_decompressed(path, raw), start=1):
                if line.strip():
                    yield _text_of_line(line, path, line_number, text_field), raw.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataError(
                f"{path}: cannot be decompressed after line {line_number} ({error}); the file is cut short or damaged"
            ) from error


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(raw))
    return raw


class _ZstdFrames(io.RawIOBase):
    """The content of concatenated zstd frames; a frame cut short raises, where the library's own reader just ends."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_started = False
        self._compressed = b""
        self._content = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            data = self._compressed or self._raw.read(1 << 17)
            self._compressed = b""
            if not data:
                if self._frame_started:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._frame_started = True
            self._content = self._frame.decompress(data)
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame, self._frame_started = zstandard.ZstdDecompressor().decompressobj(), False
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def _text_of_line(line: bytes, path: Path, line_number: int, text_field: str) -> str:
    where = f"{path}:{line_number}"
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not valid JSON ({error}): {_excerpt(line)}; each line must be one object") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}: {_excerpt(line)}")
    if text_field not in record:
        raise DataError(
            f"{where}: no field {text_field!r}; this line has {sorted(record)}. Name the field that holds the text"
        )
    text = record[text_field]
    if not isinstance(text, str):
        found = type(text).__name__
        raise DataError(f"{where}: field {text_field!r} must be a string, found {found}: {_excerpt(line)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {text_field!r} holds half a surrogate pair (U+{ord(text[error.start]):04X}, character "
            f"{error.start + 1}): {_excerpt(line)}; write the whole character, or U+FFFD for one that is lost"
        ) from error
    return text


def _excerpt(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...")


def _parquet_texts(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            if text_field not in schema.names:
                raise DataError(
                    f"{path}: no column {text_field!r}; it has {schema.names}. Name the column that holds the text"
                )
            kind = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {text_field!r} must hold strings, it holds {kind}")
            rows, size = max(1, table.metadata.num_rows), path.stat().st_size
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield _text_of_value(value, path, row, text_field), size * row // rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from error


def _text_of_value(value: Any, path: Path, row: int, text_field: str) -> str:
    where = f"{path}: row {row}: column {text_field!r}"
    try:
        text: str | None = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error}); write the file with the text in that encoding") from error
    if text is None:
        raise DataError(f"{where} is null, expected a string")
    return text
