"""Megatron's indexed token files (`PREFIX.bin` + `PREFIX.idx`): a small reader and writer of the same format.

`PREFIX.bin` holds the token ids of all documents one after the other; `PREFIX.idx` is a 34-byte header, then the
length (int32) and byte offset (int64) of every sequence and, for every document, the number of its first sequence
(int64, one more than documents). Megatron reads what we write and the other way round; a test checks both.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_sip.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHECK_BLOCK = 1 << 20
_CHECK_BLOCKS = 64
_CHECK_DOCUMENTS = 1 << 10


def token_dtype(vocab_size: int) -> type[np.generic]:
    """uint16 when every id fits (the bound Megatron uses), otherwise int32."""
    return np.uint16 if vocab_size < 65_500 else np.int32


def bin_path(prefix: Path) -> Path:
    """`PREFIX.bin`, for prefixes that contain dots too."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """`PREFIX.idx`."""
    return prefix.with_name(prefix.name + ".idx")


class TokenStore:
    """Read-only memory map of the documents under a prefix; `store[i]` is document i's token ids (a view).

    Raises `DataError` when the files are missing or unreadable, are not of this format, or the .bin is shorter than the
    .idx says.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        try:
            self._open()
        except OSError as error:
            raise DataError(f"{error.filename or bin_path(prefix)}: cannot be read ({error.strerror})") from error

    def _open(self) -> None:
        prefix = self.prefix
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a token store is a pair PREFIX.bin and PREFIX.idx")
        dtype, sequence_lengths, pointers, first_sequence = _read_index(idx_path(prefix))
        self.lengths = _document_lengths(sequence_lengths, first_sequence)
        """int64 [documents], tokens of each document."""
        self._starts = _document_starts(idx_path(prefix), dtype, sequence_lengths, pointers, first_sequence)
        # The starts by themselves too: with the lengths a damaged one could overflow.
        needed = (
            max(int(self._starts.max(initial=0)), int((self._starts + self.lengths).max(initial=0))) * dtype.itemsize
        )
        size = bin_path(prefix).stat().st_size
        if size < needed:
            raise DataError(f"{bin_path(prefix)}: {size} bytes, but its index needs {needed}; the file is cut short")
        # an empty file cannot be mapped
        count = size // dtype.itemsize
        self._tokens = np.memmap(bin_path(prefix), dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> npt.NDArray[np.generic]:
        start = int(self._starts[document])
        return self._tokens[start : start + int(self.lengths[document])]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def begins_with(self, token: int) -> bool:
        """Whether every document that holds anything begins with `token`: of all, or of 64 runs of 1,024 over the file."""
        documents = np.arange(len(self))
        if len(self) > _CHECK_BLOCKS * _CHECK_DOCUMENTS:
            runs = np.linspace(0, len(self) - _CHECK_DOCUMENTS, _CHECK_BLOCKS, dtype=np.int64)
            documents = (runs[:, None] + np.arange(_CHECK_DOCUMENTS)).ravel()
        documents = documents[self.lengths[documents] > 0]
        return len(documents) > 0 and bool((self._tokens[self._starts[documents]] == token).all())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `DataError` if an id is outside [0, vocab_size) in any of 64 blocks of 1M tokens spread over the file.

        Up to 64M tokens that is all of them; the tasks check the rest as they read it.
        """
        count = len(self._tokens)
        stride = max(_CHECK_BLOCK, count // _CHECK_BLOCKS)
        for start in range(0, count, stride):
            check_token_ids(self._tokens[start : start + _CHECK_BLOCK], vocab_size, bin_path(self.prefix))


def check_token_ids(ids: npt.NDArray[np.generic], vocab_size: int, path: Path) -> None:
    """Raise `DataError` if any of `ids`, read from `path`, is outside [0, vocab_size)."""
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise DataError(
            f"{path}: token id {bad}, but the vocabulary has only {vocab_size}; "
            "the file was made with another tokenizer: tokenise the text again, or pass the tokenizer it was made with"
        )


class TokenStoreWriter:
    """Writes documents to a prefix; a context manager. The index comes at the end; after a failure there is neither file."""

    def __init__(self, prefix: Path, dtype: type[np.generic]) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._stream = bin_path(prefix).open("wb")

    def add(self, tokens: npt.NDArray[np.generic], lengths: npt.NDArray[np.int32]) -> None:
        """Append documents: their tokens one after the other, and the length of each."""
        self._stream.write(np.ascontiguousarray(tokens, self._dtype).tobytes())
        self._lengths.append(np.asarray(lengths, np.int32))

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_whole = False
        try:
            self._stream.close()
            if error is None:
                self._write_index()
                is_whole = True
        finally:
            for path in () if is_whole else (bin_path(self._prefix), idx_path(self._prefix)):
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        with idx_path(self._prefix).open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, _CODES[self._dtype.type], len(lengths), len(lengths) + 1))
            stream.write(lengths.tobytes())
            stream.write((ends - lengths * self._dtype.itemsize).astype(np.int64).tobytes())
            stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype, sequence lengths, byte offsets, first sequence of each document and the end)."""
    data = np.memmap(path, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    if len(data) < _HEADER.size or bytes(data[:9]) != _MAGIC:
        raise DataError(f"{path}: not an index of Megatron's format (it must start with {_MAGIC[:7].decode()})")
    _, version, code, sequences, documents = _HEADER.unpack(bytes(data[: _HEADER.size]))
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path}: version {version}, token type {code}; readable are version 1, types {sorted(_DTYPES)}"
        )
    if len(data) < _HEADER.size + 12 * sequences + 8 * documents:
        raise DataError(f"{path}: {len(data)} bytes are too few for {sequences} sequences; the file is cut short")
    at = _HEADER.size
    lengths = np.frombuffer(data, np.int32, sequences, at)
    pointers = np.frombuffer(data, np.int64, sequences, at + 4 * sequences)
    first = np.frombuffer(data, np.int64, documents, at + 12 * sequences)
    if documents == 0 or first[0] != 0 or first[-1] != sequences or (first[1:] < first[:-1]).any():
        raise DataError(f"{path}: its documents do not cover its {sequences} sequences; the file is damaged")
    if lengths.min(initial=0) < 0 or pointers.min(initial=0) < 0 or (pointers % np.dtype(_DTYPES[code]).itemsize).any():
        raise DataError(f"{path}: a sequence has a negative length or begins inside a token; the file is damaged")
    return np.dtype(_DTYPES[code]), lengths, pointers, first


def _document_lengths(sequence_lengths: np.ndarray, first_sequence: np.ndarray) -> npt.NDArray[np.int64]:
    ends = np.concatenate([[0], np.cumsum(sequence_lengths, dtype=np.int64)])
    return np.diff(ends[first_sequence])


def _document_starts(
    path: Path, dtype: np.dtype, lengths: np.ndarray, pointers: np.ndarray, first_sequence: np.ndarray
) -> npt.NDArray[np.int64]:
    """First token of each document; the sequences of a document must follow one another in the .bin."""
    if not len(lengths):
        return np.zeros(len(first_sequence) - 1, np.int64)
    jumps = np.flatnonzero(pointers[1:] != pointers[:-1] + lengths[:-1].astype(np.int64) * dtype.itemsize) + 1
    if not np.isin(jumps, first_sequence).all():
        raise DataError(f"{path}: a document's sequences are not contiguous in the .bin; write it again")
    # an empty document at the very end starts after the last sequence
    return pointers[np.minimum(first_sequence[:-1], len(lengths) - 1)] // dtype.itemsize
