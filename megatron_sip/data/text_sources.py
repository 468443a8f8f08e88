"""Readers of text documents: JSON lines (plain, .gz, .zst) and parquet.

Each yields batches of texts with the position reached in the file, so that the caller can show progress and tokenise
batch by batch with flat memory. A file that is broken anywhere raises a `DataError` naming file, line and mend.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_sip.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSION_SUFFIXES = (".gz", ".zst")
PARQUET_SUFFIX = ".parquet"
SUPPORTED = ".jsonl, .ndjson, .json (one object a line), each also .gz or .zst, and .parquet"
MAX_DOCUMENT_BYTES = 1 << 27
"""Of one line or one parquet value: a file without line ends (or a compression bomb) must not fill the memory."""

_BATCH_CHARACTERS = 2_000_000
_BATCH_DOCUMENTS = 1_000
_EXCERPT = 80
_NAMES_SHOWN = 20
_MAX_ZSTD_WINDOW = 1 << 31  # the format's largest, of `zstd --ultra --long=31`; the library stops at 1 << 27
_POINTERS = {b"version https://git-lfs": "git lfs pull", b"/annex/objects/": "git annex get"}


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts in file order; `position` is how far the file has been read, in bytes of the file on disk."""

    texts: list[str]
    position: int


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """As `TextBatch`, with records."""

    records: list[dict[str, Any]]
    position: int


def source_suffix(path: Path) -> str:
    """The end of the name that tells the format, in lower case (".jsonl.gz"); "" for what `read_texts` does not read."""
    name = path.name.lower()
    if name.endswith(PARQUET_SUFFIX):
        return PARQUET_SUFFIX
    compression = next((suffix for suffix in COMPRESSION_SUFFIXES if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    return next((suffix + compression for suffix in JSON_SUFFIXES if name.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """A file's name without what tells its format."""
    return path.name[: len(path.name) - len(source_suffix(path))]


def is_text_source(path: Path) -> bool:
    """Whether the name ends like a format that `read_texts` reads."""
    return source_suffix(path) != ""


def read_texts(path: Path, text_field: str) -> Iterator[TextBatch]:
    """Every document's text in file order, empty ones included.

    Raises `DataError` on a broken line, a missing or non-string text field, or a truncated or unreadable file.
    """
    for batch in read_records(path, text_field):
        yield TextBatch([record[text_field] for record in batch.records], batch.position)


def read_records(path: Path, text_field: str, others: Sequence[str] = ()) -> Iterator[RecordBatch]:
    """As `read_texts`, each document as a dict of its text and, as far as it has them, of the fields `others`."""
    is_parquet = source_suffix(path) == PARQUET_SUFFIX
    found = (_parquet_records if is_parquet else _json_records)(path, text_field, others)
    records: list[dict[str, Any]] = []
    characters = position = 0
    for record, position in found:
        records.append(record)
        characters += len(record[text_field])
        if characters >= _BATCH_CHARACTERS or len(records) >= _BATCH_DOCUMENTS:
            yield RecordBatch(records, position)
            records, characters = [], 0
    yield RecordBatch(records, max(position, path.stat().st_size))


def _refuse_pointer(path: Path) -> None:
    """Raise `DataError` for what stands in for a file that was not fetched, and for a file that cannot be opened."""
    try:
        with path.open("rb") as raw:
            start = raw.read(32)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for mark, command in _POINTERS.items():
        if start.startswith(mark):
            raise DataError(f"{path}: a pointer to the file, not the file itself; fetch it with {command}")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Every line of a file of JSON lines that is not blank: its number, from 1, its bytes, and how far the file has been read.

    Raises `DataError` for what stands in for a file that was not fetched, a line that is too long, a file that is cut short.
    """
    _refuse_pointer(path)
    with path.open("rb") as raw:
        line_number = 0
        try:
            for line_number, line in enumerate(_lines(_decompressed(path, raw)), start=1):
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise DataError(
                        f"{path}:{line_number}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB: {_excerpt(line)}; each line "
                        "must be one object, and a document this large is better cut into several"
                    )
                if line.strip():
                    yield line_number, line, raw.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataError(
                f"{path}: cannot be decompressed after line {line_number} ({error}); the file is cut short or damaged"
            ) from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read after line {line_number} ({error.strerror})") from error


def _json_records(path: Path, text_field: str, others: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
    for line_number, line, position in numbered_lines(path):
        record = _record_of_line(line, path, line_number, text_field)
        yield {name: record[name] for name in (text_field, *others) if name in record}, position


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        yield line


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    suffix = source_suffix(path)
    if not suffix.endswith(COMPRESSION_SUFFIXES):
        return raw
    if path.stat().st_size == 0:
        raise EOFError("it is empty, where even no text makes an archive of some bytes")
    reader = gzip.GzipFile(fileobj=raw) if suffix.endswith(".gz") else _ZstdFrames(raw)
    return io.BufferedReader(reader, 1 << 17)


class _ZstdFrames(io.RawIOBase):
    """The content of concatenated zstd frames; a frame cut short raises, where the library's own reader just ends."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = _zstd_frame()
        self._frame_started = False
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            # Few bytes at a time: all of their content is held, and a bomb's is a hundred thousand times as much.
            data = self._compressed or self._raw.read(1 << 10)
            self._compressed = b""
            if not data:
                if self._frame_started:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._frame_started = True
            self._content = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame, self._frame_started = _zstd_frame(), False
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def _zstd_frame() -> zstandard.ZstdDecompressionObj:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj()


def _record_of_line(line: bytes, path: Path, line_number: int, text_field: str) -> dict[str, Any]:
    where = f"{path}:{line_number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, no UTF-8, an integer of 4,300 digits
        raise DataError(f"{where}: not valid JSON ({error}): {_excerpt(line)}; each line must be one object") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}: {_excerpt(line)}")
    if text_field not in record:
        raise DataError(
            f"{where}: no field {text_field!r}; this line has {_names(sorted(record))}. Name the field that holds the text"
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
    return record


def _excerpt(line: bytes) -> str:
    text = line[: 8 * _EXCERPT].decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "...")


def _names(names: list[str]) -> str:
    """Names of fields or columns, not too many."""
    shown = ", ".join(repr(name[:_EXCERPT]) for name in names[:_NAMES_SHOWN])
    return f"[{shown}]" + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")


def _parquet_records(path: Path, text_field: str, others: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
    def columns(schema: Any) -> list[str]:
        _check_column(path, schema, text_field)
        return [text_field, *(name for name in others if name != text_field and name in schema.names)]

    row = 0
    for batch, position in parquet_batches(path, columns):
        names = batch.schema.names
        texts = batch.column(names.index(text_field))
        beside = {name: batch.column(names.index(name)) for name in names if name != text_field}
        for place, value in enumerate(texts):
            row += 1
            text = _text_of_value(value, path, row, text_field)
            yield {text_field: text, **{name: column[place].as_py() for name, column in beside.items()}}, position


def parquet_batches(path: Path, columns: Callable[[Any], list[str]]) -> Iterator[tuple[Any, int]]:
    """Record batches of those columns that are chosen from a file's schema, and how far the file has been read.

    Raises DataError for a file that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    _refuse_pointer(path)
    row = 0
    try:
        # Read piece by piece: by default all of a row group is held.
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20) as table:
            names = columns(table.schema_arrow)
            rows, size = table.metadata.num_rows, path.stat().st_size
            for batch in table.iter_batches(batch_size=256, columns=names):
                row += batch.num_rows
                yield batch, size * row // max(1, rows)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for a column's name
        after = f" after row {row}" if row else ""
        raise DataError(f"{path}: cannot be read as parquet{after} ({error})") from error
    if row != rows:
        raise DataError(f"{path}: holds {row} rows, where its end says {rows}; the file is damaged")


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    import pyarrow.types as kinds

    count = schema.names.count(text_field)
    if count != 1:
        found = f"{count} columns" if count else "no column"
        raise DataError(
            f"{path}: {found} {text_field!r}; it has {_names(schema.names)}. Name the one column that holds the text"
        )
    kind = schema.field(text_field).type
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(value) or kinds.is_large_string(value) or kinds.is_string_view(value)):
        raise DataError(f"{path}: column {text_field!r} must hold strings, it holds {str(kind)[:_EXCERPT]}")


def _text_of_value(value: Any, path: Path, row: int, text_field: str) -> str:
    where = f"{path}: row {row}: column {text_field!r}"
    try:
        text: str | None = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error}); write the file with the text in that encoding") from error
    if text is None:
        raise DataError(f"{where} is null, expected a string")
    if len(text) > MAX_DOCUMENT_BYTES:
        raise DataError(f"{where} has {len(text)} characters; a document this large is better cut into several")
    return text
