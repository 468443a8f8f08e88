"""How many held-out documents have the same text as a training document: what was seen in training tests nothing.

A document's hash is of its token ids without BOS and EOS, 8 bytes. Held are the hashes of the test documents; those of
the training documents pass by in blocks, so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_sip.console import bars
from megatron_sip.data.token_store import TokenStore, bin_path, idx_path
from megatron_sip.files import write_atomically

if TYPE_CHECKING:
    from megatron_sip.data.documents import Corpus

log = logging.getLogger(__name__)

MAX_HASHED_BYTES = 1 << 34
"""Of a .bin that was not tokenised here: its documents are hashed once, at some 200 MB/s; a larger one is not counted."""
_BLOCK = 1 << 20

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class SharedTexts:
    """`shared` of `documents` test documents have the text of a training document; `uncounted` token stores have no hashes."""

    documents: int
    shared: int
    uncounted: tuple[Path, ...] = ()

    def __str__(self) -> str:
        text = f"{self.shared} of {self.documents} held-out documents have the same text as a training document"
        if self.shared:
            text += ": the held-out comparison counts them, deduplicate the corpus"
        if self.uncounted:
            more = f" and {len(self.uncounted) - 1} more" if self.uncounted[1:] else ""
            text += f" (not counted: {bin_path(self.uncounted[0])}{more})"
        return text


def hash_path(prefix: Path) -> Path:
    """The hashes of a token store's documents, one uint64 each, where they were written as it was."""
    return prefix.with_name(prefix.name + ".hash")


def hash_documents(documents: Iterable[npt.NDArray[np.generic]]) -> Hashes:
    """uint64 [documents]: equal for equal token ids, of any integer type."""
    digests = (hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest() for ids in documents)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)


def count_shared_texts(train: Corpus, test: Corpus, around: tuple[int | None, int | None], cache: Path) -> SharedTexts:
    """Compare two splits, of one corpus or each of files of its own.

    `around`: the tokenizer's BOS and EOS, which are no text; `cache`: where the hashes of token stores that have none are kept.
    """
    prefixes = list(dict.fromkeys(prefix for source in (*train.sources, *test.sources) for prefix in source.prefixes))
    files = {prefix: file for prefix in prefixes if (file := _hash_file(prefix, around, cache)) is not None}
    held = np.concatenate([np.zeros(0, np.uint64), *_split_hashes(test, files)])
    held = held[held != hash_documents([np.zeros(0)])]
    texts, copies = np.unique(held, return_counts=True)
    seen = np.zeros(len(texts), bool)
    for hashes in _split_hashes(train, files) if len(texts) else ():
        place = np.minimum(np.searchsorted(texts, hashes), len(texts) - 1)
        seen[place[texts[place] == hashes]] = True
    return SharedTexts(len(held), int(copies[seen].sum()), tuple(prefix for prefix in prefixes if prefix not in files))


def _split_hashes(corpus: Corpus, files: dict[Path, Path]) -> Iterator[Hashes]:
    """The hashes of a split's documents, in blocks."""
    for number, source in enumerate(corpus.sources):
        documents, begin = corpus.documents(number), 0
        for prefix, count in zip(source.prefixes, source.counts, strict=True):
            first, last = np.searchsorted(documents, [begin, begin + count])
            if prefix in files and first < last:
                hashes = np.memmap(files[prefix], "<u8", "r")
                for start in range(first, last, _BLOCK):
                    yield hashes[documents[start : min(start + _BLOCK, last)] - begin]
            begin += count


def _hash_file(prefix: Path, around: tuple[int | None, int | None], cache: Path) -> Path | None:
    """The hashes beside the store or in the cache, made first if need be; None for too large a store or a full disk."""
    store = TokenStore(prefix)
    beside = hash_path(prefix)
    stats = [path.stat() for path in (bin_path(prefix), idx_path(prefix))]
    identity = [str(bin_path(prefix).resolve()), around, *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    kept = cache.expanduser() / f"documents-{key}.hash"
    for path in (beside, kept):
        if path.is_file() and path.stat().st_size == 8 * len(store):
            return path
    if stats[0].st_size > MAX_HASHED_BYTES:
        log.warning("%s is too large to be searched for texts that are held out and trained on", bin_path(prefix))
        return None
    bos, eos = around
    title = f"compare texts of {prefix.name}"
    numbers = tqdm(range(len(store)), title, unit="document", file=bars(), disable=len(store) < _BLOCK // 10)
    hashes = hash_documents(_without(store[number], bos, eos) for number in numbers)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, hashes.tobytes())
    except OSError as error:  # it is only for a count
        log.warning("%s: the hashes of its documents cannot be kept (%s)", bin_path(prefix), error)
        return None
    return kept


def _without(ids: npt.NDArray[np.generic], bos: int | None, eos: int | None) -> npt.NDArray[np.generic]:
    begin = int(len(ids) > 0 and ids[0] == bos)
    end = len(ids) - int(len(ids) > begin and ids[-1] == eos)
    return ids[begin:end]
