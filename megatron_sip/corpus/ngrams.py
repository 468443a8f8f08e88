"""Word n-grams of a text, as 64-bit hashes: what duplicates and overlaps with evaluation sets are found by.

Case, punctuation and white space do not count, as in RedPajama-V2's hashes. Words are what white space divides: a text in a
script without spaces has few or one, and is then compared whole.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_sip.data.ordering import hash64

NGRAM = 13
Hashes = npt.NDArray[np.uint64]

_PUNCTUATION = re.compile(
    r"[!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u2010-\u205e\u3001-\u3011"  # no vowel signs of any script
    r"\u00ad\u061c\u180e\u200b-\u200f\u2060-\u206f\ufeff]"  # nor what is not seen (Unicode's category Cf)
)
_WEIGHTS = np.array([hash64(place, 0x6E6772616D) | 1 for place in range(64)], np.uint64)  # odd: a word's hash is kept
MAX_NGRAM = len(_WEIGHTS)


def normalised_words(text: str) -> list[str]:
    """The words of a text, without what two copies of it often differ in; none of a text of signs alone."""
    return _PUNCTUATION.sub("", unicodedata.normalize("NFC", text.lower())).split()


def words_digest(words: list[str]) -> bytes:
    """16 bytes, equal for texts of equal words."""
    return hashlib.blake2b(" ".join(words).encode(errors="surrogatepass"), digest_size=16).digest()


def ngram_hashes(words: list[str], ngram: int = NGRAM) -> Hashes:
    """uint64 [max(0, words - ngram + 1)]: a hash of every run of `ngram` words, in order.

    The sum of its words' hashes, each times an odd number of its place's own, modulo 2^64.
    """
    count = len(words) - ngram + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter(
        (xxhash.xxh3_64_intdigest(word.encode(errors="surrogatepass")) for word in words), np.uint64, len(words)
    )
    total = np.zeros(count, np.uint64)
    for place in range(ngram):
        total += hashes[place : place + count] * _WEIGHTS[place]
    return total
