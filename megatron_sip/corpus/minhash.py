"""MinHash signatures of texts (datasketch), and the bands by whose equality near-duplicates are found.

Two signatures agree in as many of their places as their texts share n-grams, on average (Jaccard similarity). A band is a run
of places; texts that agree in all of one are candidates, whose whole signatures are then compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from megatron_sip.corpus.ngrams import MAX_NGRAM, NGRAM, Hashes, ngram_hashes
from megatron_sip.errors import UserError

PLACES = 128
"""Of a signature: the estimate of a similarity of 0.8 is off by 0.035 (one standard deviation)."""
_FOUND = 0.99
_LOW_BITS = np.uint64((1 << 32) - 1)
_SEED = 1
_BLOCK = 1 << 14
"""Documents whose keys are made at once."""
Signature = npt.NDArray[np.uint32]


class DedupError(UserError, ValueError):
    """Settings or files that duplicates cannot be found with; the message names the flag or file, and what would be right."""


@dataclass(frozen=True, slots=True)
class NearSettings:
    """Texts are near-duplicates whose sets of word n-grams have at least this Jaccard similarity.

    Raises DedupError for what cannot be.
    """

    similarity: float = 0.8
    ngram: int = NGRAM

    def __post_init__(self) -> None:
        if not 0.4 <= self.similarity <= 1:
            raise DedupError(f"--similarity {self.similarity}: 0.4 to 1 can be told by {PLACES} hashes")
        if not 1 <= self.ngram <= MAX_NGRAM:
            raise DedupError(f"--ngram {self.ngram}: 1 to {MAX_NGRAM} words")

    @property
    def rows(self) -> int:
        """Places of a band: the most with which 99% of the pairs at the bound itself agree in one of the bands."""
        return max(rows for rows in range(1, PLACES + 1) if self._found(rows) >= _FOUND)

    def _found(self, rows: int) -> float:
        return 1 - (1 - self.similarity**rows) ** (PLACES // rows)


class Signer:
    """Makes signatures: equal settings give equal ones, in any process."""

    def __init__(self, settings: NearSettings) -> None:
        self._ngram = settings.ngram
        self._empty = MinHash(PLACES, seed=_SEED, hashfunc=int)  # its permutations are drawn once

    def signature(self, words: list[str]) -> Signature:
        """uint32 [PLACES], of a text with at least one word; one that is shorter than an n-gram counts as one."""
        hashes = ngram_hashes(words, min(self._ngram, len(words)))
        sketch = self._empty.copy()
        sketch.update_batch((np.unique(hashes) & _LOW_BITS).astype(np.uint32))
        return sketch.hashvalues


def band_keys(signatures: npt.NDArray[np.uint32], rows: int) -> Hashes:
    """uint64 [bands, documents] of uint32 [documents, PLACES]: texts that agree in a band have the same key there."""
    keys = np.empty((signatures.shape[1] // rows, len(signatures)), np.uint64)
    for begin in range(0, len(signatures), _BLOCK):  # what a key is made of takes more room than the signatures
        keys[:, begin : begin + _BLOCK] = _block_keys(signatures[begin : begin + _BLOCK], rows).T
    return keys


def _block_keys(signatures: npt.NDArray[np.uint32], rows: int) -> Hashes:
    """uint64 [documents, bands]"""
    bands = signatures.shape[1] // rows
    places = signatures[:, : bands * rows].astype(np.uint64).reshape(len(signatures), bands, rows)
    keys = np.zeros((len(signatures), bands), np.uint64)
    for place in range(
        rows
    ):  # a hash of the run: each step is a bijection of the next place and mixes what went before
        keys = (keys ^ places[:, :, place]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def similarity(one: Signature, others: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """float64 [others]: the estimated Jaccard similarity of a text to each of uint32 [others, PLACES]."""
    return np.asarray((others == one).mean(axis=1))
