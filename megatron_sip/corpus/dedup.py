"""`dedup`: a corpus without the documents that repeat an earlier one, word for word or nearly.

First every shard is sketched (OUT/.sketches/SHARD: hashes of its documents), then the repetitions are found in all sketches
together, in the order of shards and documents, and the others are written. Sketches and shards that were done before a kill are
not made again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sip.corpus.counting import mark_of, summed
from megatron_sip.corpus.folder import (
    CorpusFolder,
    made_of,
    name_of,
    read_documents,
    shards_of,
    writing_documents,
)
from megatron_sip.corpus.minhash import PLACES, DedupError, NearSettings, Signer, band_keys, similarity
from megatron_sip.corpus.near_duplicates import Documents, originals
from megatron_sip.corpus.ngrams import Hashes, normalised_words, words_digest
from megatron_sip.corpus.redpajama_signatures import (
    SignatureTable,
    check_signatures,
    column_of,
    id_hash,
    read_signatures,
)
from megatron_sip.corpus.workers import Tick, work_on
from megatron_sip.data.corpus_files import CorpusFile, digest
from megatron_sip.files import move_into_place

KEPT, EXACT, NEAR = range(3)
REASONS = {EXACT: "exact", NEAR: "near"}
Fates = npt.NDArray[np.uint8]
"""[documents]: one of these three each."""


@dataclass(frozen=True, slots=True)
class DedupWork:
    """near: None where only texts of equal words are repetitions. signatures: RedPajama-V2's minhash/*.parquet, which then say
    what is near; else signatures are made here. Raises DedupError for a similarity that those files have not."""

    corpus: Path
    out: Path
    near: NearSettings | None
    signatures: tuple[Path, ...] = ()
    workers: int = 1

    def __post_init__(self) -> None:
        if self.signatures and self.near is not None:
            column_of(self.near.similarity)


def dedup(work: DedupWork) -> dict[str, Any]:
    """The manifest of the corpus without repetitions. Raises CorpusError, DedupError, DataError."""
    shards = shards_of(work.corpus)
    if work.near is not None:
        check_signatures(work.signatures, work.near.similarity)
    settings = {
        "near": None if work.near is None else asdict(work.near),
        "signatures": [{"path": str(path), "sha256": digest(path)} for path in work.signatures],
    }
    made_from = made_of(work.corpus)
    with CorpusFolder.open(work.out, {"command": "dedup", "made_from": made_from, **settings}) as folder:
        if not folder.is_finished():
            names = [name_of(shard.path) for shard in shards]
            sketches = [Sketch(work.out / ".sketches" / name) for name in names]
            make_sketches(shards, sketches, work)
            write_shards(shards, fates_of(sketches, work), folder, work.workers)
            found, _ = summed(folder, names)
            folder.finish({"command": "dedup", "settings": settings, "made_from": made_from, **found})
        shutil.rmtree(work.out / ".sketches", ignore_errors=True)
        return folder.manifest()


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is kept of a shard's documents: arrays in files of `folder`, which is there as a whole or not at all.

    exact: uint64 [2, documents], halves of a hash of the words. ids: uint64 [documents], hashes of the ids. Where signatures
    are made here, signatures: uint32 [documents, PLACES], and keys: uint64 [bands, documents].
    """

    folder: Path

    def array(self, name: str) -> npt.NDArray[Any]:
        """One of them, mapped into memory."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def write(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Keep all of them."""
        staged = self.folder.with_name(f".{self.folder.name}.staged")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(staged / f"{name}.npy", array)
        move_into_place(staged, self.folder)


def make_sketches(shards: Sequence[CorpusFile], sketches: Sequence[Sketch], work: DedupWork) -> None:
    """Sketch the shards that have none yet."""
    missing = [(shard, sketch) for shard, sketch in zip(shards, sketches, strict=True) if not sketch.folder.exists()]
    near = None if work.signatures else work.near
    size = sum(shard.bytes for shard, _ in missing)
    work_on(missing, partial(make_sketch, near), work.workers, size, "sketch")


def make_sketch(near: NearSettings | None, shard: tuple[CorpusFile, Sketch], tick: Tick) -> None:
    """Sketch the documents of a shard, with signatures where `near` is given. Raises DataError."""
    file, sketch = shard
    file.check()
    signer = None if near is None else Signer(near)
    exact, ids, signatures = bytearray(), [], bytearray()
    for document in read_documents(file.path, tick):
        words = normalised_words(document.text) or [document.text.strip()]
        exact += words_digest(words)
        ids.append(id_hash(document.id))
        if signer is not None:
            signatures += signer.signature(words).tobytes()
    arrays: dict[str, npt.NDArray[Any]] = {
        "exact": np.ascontiguousarray(np.frombuffer(exact, np.uint64).reshape(-1, 2).T),
        "ids": np.array(ids, np.uint64),
    }
    if near is not None:
        arrays["signatures"] = np.frombuffer(signatures, np.uint32).reshape(-1, PLACES)
        arrays["keys"] = band_keys(arrays["signatures"], near.rows)
    sketch.write(arrays)


def write_shards(shards: Sequence[CorpusFile], fates: Sequence[Fates], folder: CorpusFolder, workers: int) -> None:
    """Write the shards that are not done yet."""
    both = zip(shards, fates, strict=True)
    left = [(shard, fate) for shard, fate in both if folder.mark(name_of(shard.path)) is None]
    work_on(left, partial(write_kept, folder), workers, sum(shard.bytes for shard, _ in left), "write")


def write_kept(folder: CorpusFolder, shard: tuple[CorpusFile, Fates], tick: Tick) -> None:
    """Write the documents of a shard that stay, and then its mark. Raises DataError."""
    file, fates = shard
    file.check()  # the corpus may have changed since it was sketched
    name = name_of(file.path)
    counts: Counter[str] = Counter({"documents/read": len(fates)})
    with writing_documents(folder.documents(name)) as write:
        for document, fate in zip(read_documents(file.path, tick), fates, strict=True):
            if fate != KEPT:
                counts[f"dropped/{REASONS[fate]}"] += 1
                continue
            counts["documents/kept"] += 1
            counts[f"by_subset/{document.subset}"] += 1
            write(document)
    folder.mark_done(name, mark_of(folder, [file.path], [folder.documents(name)], counts))


def fates_of(sketches: Sequence[Sketch], work: DedupWork) -> list[Fates]:
    """What becomes of the documents of each shard: the first in order stays, the others are repetitions of it."""
    halves = np.concatenate([sketch.array("exact") for sketch in sketches], axis=1)
    repeats = originals(
        halves[:1], np.ones(halves.shape[1], bool), lambda one, others: halves[1, others] == halves[1, one]
    )
    fates = np.where(repeats < 0, KEPT, EXACT).astype(np.uint8)
    if work.near is not None:
        is_first = fates == KEPT
        if work.signatures:
            near = _near_by_table(sketches, read_signatures(work.signatures, work.near.similarity), is_first, work)
        else:
            near = _near_by_signatures(sketches, work.near, is_first)
        fates[near >= 0] = NEAR
    counts = [sketch.array("ids").size for sketch in sketches]
    return np.split(fates, np.cumsum(counts)[:-1])


def _near_by_signatures(sketches: Sequence[Sketch], near: NearSettings, candidates: npt.NDArray[np.bool_]) -> Documents:
    keys = [sketch.array("keys") for sketch in sketches]
    signatures = [sketch.array("signatures") for sketch in sketches]
    starts = np.cumsum([0, *map(len, signatures)])

    def rows(documents: Documents) -> npt.NDArray[np.uint32]:
        shards = np.searchsorted(starts, documents, side="right") - 1
        found = np.empty((len(documents), PLACES), np.uint32)
        for shard in np.unique(shards):
            own = shards == shard
            found[own] = signatures[shard][documents[own] - starts[shard]]
        return found

    def alike(document: int, others: Documents) -> npt.NDArray[np.bool_]:
        found = rows(np.append(document, others))
        return similarity(found[0], found[1:]) >= near.similarity

    bands = range(len(keys[0]))
    return originals((np.concatenate([own[band] for own in keys]) for band in bands), candidates, alike)


def _near_by_table(
    sketches: Sequence[Sketch], table: SignatureTable, candidates: npt.NDArray[np.bool_], work: DedupWork
) -> Documents:
    rows = [table.rows(sketch.array("ids")) for sketch in sketches]
    for sketch, own in zip(sketches, rows, strict=True):
        if len(missing := np.flatnonzero(own < 0)):
            raise DedupError(
                f"--signatures: no row for {len(missing)} of the {len(own)} documents of {sketch.folder.name}, "
                f"as for number {missing[0] + 1}: name the minhash files of all its shards"
            )
    of_document = np.concatenate(rows)
    columns: list[Hashes] = [band[of_document] for band in table.bands]
    everyone = lambda _, others: np.ones(len(others), bool)  # noqa: E731
    return originals(columns, candidates & table.present[of_document], everyone)
