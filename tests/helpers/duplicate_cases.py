"""Texts whose sets of word 13-grams have a known Jaccard similarity, for tests and the benchmark of deduplication."""

from __future__ import annotations

import random

NGRAM = 13


def vocabulary(seed: int, size: int = 20_000) -> list[str]:
    """Made-up words, none of them twice."""
    draws = random.Random(seed)
    return sorted({"".join(draws.choices("abcdefghijklmnopqrstuvwxyz", k=draws.randint(3, 10))) for _ in range(size)})


def grams(words: list[str], ngram: int = NGRAM) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)}


def jaccard(one: list[str], other: list[str]) -> float:
    """Of their sets of 13-grams, by counting."""
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b)


def planted_pair(words: list[str], similarity: float, seed: int, length: int = 400) -> tuple[list[str], list[str]]:
    """Two texts of `length` drawn words: the second has another end, so long that they are `similarity` alike."""
    draws = random.Random(f"{seed} {similarity}")
    first = draws.choices(words, k=length)
    count = length - NGRAM + 1
    shared = round(2 * count * similarity / (1 + similarity))  # n-grams: shared / (2 count - shared) = similarity
    kept = shared + NGRAM - 1
    return first, first[:kept] + draws.choices(words, k=length - kept)
