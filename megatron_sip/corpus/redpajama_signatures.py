"""RedPajama-V2's own MinHash signatures: minhash/*.parquet, a row a document, `id` and a list of bands for each similarity.

A band is a string of bytes; documents that have one in common are near-duplicates, as RedPajama's authors defined it. Documents
that were too short for it have null.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from megatron_sip.corpus.minhash import DedupError
from megatron_sip.corpus.near_duplicates import Documents
from megatron_sip.corpus.ngrams import Hashes
from megatron_sip.errors import DataError

SIMILARITIES = (0.7, 0.8, 0.9, 1.0)
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class SignatureTable:
    """Of every row of the files. ids: uint64 [rows], ascending hashes of the documents' ids. bands: uint64 [bands, rows].
    present: bool [rows], false where the signature is null."""

    ids: Hashes
    bands: Hashes
    present: npt.NDArray[np.bool_]

    def rows(self, ids: Hashes) -> Documents:
        """int64 [documents]: the row of each document, -1 where it has none."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[places] == ids, places, -1)


def id_hash(name: str) -> int:
    """64 bits of a document's id."""
    return xxhash.xxh3_64_intdigest(name.encode(errors="surrogatepass"))


def column_of(similarity: float) -> str:
    """The column of that similarity. Raises DedupError where there is none."""
    if similarity not in SIMILARITIES:
        known = ", ".join(map(str, SIMILARITIES))
        raise DedupError(
            f"--similarity {similarity}: RedPajama's signatures are of {known}; leave out --signatures for others"
        )
    return f"signature_sim{similarity}"


def read_signatures(paths: Sequence[Path], similarity: float) -> SignatureTable:
    """All rows of the files, in memory. Raises DedupError, DataError."""
    column = column_of(similarity)
    ids: list[Hashes] = []
    bands: list[Hashes] = []
    present: list[npt.NDArray[np.bool_]] = []
    widths: set[int] = set()
    for path in paths:
        first = 1
        for batch in _batches(path, column):
            names, signatures = batch.columns
            if names.null_count or signatures.flatten().null_count:
                raise DataError(
                    f"{path}: {names.null_count} ids and {signatures.flatten().null_count} bands of rows {first} to "
                    f"{first + len(names) - 1} are null: not RedPajama-V2's signatures"
                )
            first += len(names)
            widths.update(pc.list_value_length(signatures.drop_null()).to_pylist())
            if len(widths) > 1:
                raise DataError(f"{path}: the lists in {column!r} differ in length: not RedPajama-V2's signatures")
            ids.append(np.array([id_hash(name) for name in names.to_pylist()], np.uint64))
            bands.append(
                np.array([xxhash.xxh3_64_intdigest(band) for band in signatures.flatten().to_pylist()], np.uint64)
            )
            present.append(np.array(signatures.is_valid(), bool))
    if not any(widths):
        raise DataError(f"{paths[0]}: no signature in {column!r}, nor in the other files")
    has, order = np.concatenate(present), np.argsort(np.concatenate(ids), kind="stable")
    keys = np.zeros((len(has), *widths), np.uint64)
    keys[has] = np.concatenate(bands).reshape(-1, *widths)
    return SignatureTable(np.concatenate(ids)[order], np.ascontiguousarray(keys[order].T), has[order])


def check_signatures(paths: Sequence[Path], similarity: float) -> None:
    """What can be known before hours of sketches. Raises DedupError, DataError for files that are none of RedPajama's."""
    for path in paths:
        with _opened(path, column_of(similarity)):
            pass


@contextlib.contextmanager
def _opened(path: Path, column: str) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as table:
            missing = [name for name in ("id", column) if name not in table.schema_arrow.names]
            if missing:
                found = ", ".join(table.schema_arrow.names[:10])
                raise DataError(
                    f"{path}: no column {missing[0]!r}; it has {found}. Name RedPajama-V2's minhash/*.parquet"
                )
            yield table
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error})") from error


def _batches(path: Path, column: str) -> Iterator[pa.RecordBatch]:
    with _opened(path, column) as table:
        yield from table.iter_batches(batch_size=_ROWS, columns=["id", column])
