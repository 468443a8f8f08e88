"""Near-duplicates: equal to datasketch's own index, asked document by document; recall and precision of planted ones."""

from __future__ import annotations

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from duplicate_cases import jaccard, planted_pair, vocabulary
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.corpus import minhash
from megatron_sip.corpus.minhash import PLACES, DedupError, NearSettings, Signer, band_keys, similarity
from megatron_sip.corpus.near_duplicates import originals
from megatron_sip.corpus.ngrams import ngram_hashes, normalised_words

WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=12)


def near(signatures: np.ndarray, bound: float, rows: int) -> list[int]:
    keys = band_keys(signatures, rows)
    everyone = np.ones(len(signatures), bool)
    return originals(
        keys, everyone, lambda one, others: similarity(signatures[one], signatures[others]) >= bound
    ).tolist()


@given(st.lists(WORDS, min_size=1, max_size=25), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_first_is_kept_as_by_datasketch_s_index(texts: list[list[str]], bound: float) -> None:
    settings = NearSettings(bound, ngram=2)
    signatures = np.stack([Signer(settings).signature(words) for words in texts])
    index = MinHashLSH(num_perm=PLACES, params=(PLACES // settings.rows, settings.rows))
    sketches = [MinHash(PLACES, hashvalues=signature, scheme="affine32") for signature in signatures]
    expected = []
    for number, sketch in enumerate(sketches):
        same = [key for key in index.query(sketch) if sketch.jaccard(sketches[key]) >= bound]
        expected.append(min(same, default=-1))
        if not same:
            index.insert(number, sketch)
    assert near(signatures, bound, settings.rows) == expected


@given(st.lists(st.integers(0, 5), max_size=30), st.data())
def test_by_a_key_alone_each_is_a_repetition_of_the_first_with_it(keys: list[int], data: st.DataObject) -> None:
    candidates = np.array(data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))), bool)
    found = originals([np.array(keys, np.uint64)], candidates, lambda _, others: np.ones(len(others), bool))
    first: dict[int, int] = {}
    for number, key in enumerate(keys):
        expected = first.setdefault(key, number) if candidates[number] else number
        assert found[number] == (-1 if expected == number else expected)


def test_signatures_estimate_the_similarity_of_the_sets_of_ngrams() -> None:
    signer, words = Signer(NearSettings()), vocabulary(0)
    for wanted in (0.5, 0.7, 0.9):
        pairs = [planted_pair(words, wanted, seed, length=400) for seed in range(50)]
        true = np.mean([jaccard(*pair) for pair in pairs])
        estimated = np.mean([similarity(signer.signature(a), signer.signature(b)[None])[0] for a, b in pairs])
        assert abs(true - wanted) < 0.01
        assert abs(true - estimated) < 0.02


def test_planted_near_duplicates_are_found_and_those_below_the_bound_are_not() -> None:
    """200 pairs of each kind: at 0.9 at most 1% are missed, at 0.7 at most 4% taken for one (0.7% are expected)."""
    settings = NearSettings(0.8)
    signer, words = Signer(settings), vocabulary(1)
    for wanted, least, most in ((0.9, 198, 200), (0.7, 0, 8)):
        texts = [text for seed in range(200) for text in planted_pair(words, wanted, seed, length=300)]
        found = near(np.stack([signer.signature(text) for text in texts]), 0.8, settings.rows)
        pairs = sum(found[second] == second - 1 for second in range(1, len(texts), 2))
        assert least <= pairs <= most
        assert sum(original >= 0 for original in found) == pairs


def test_case_punctuation_and_white_space_do_not_count_and_marks_of_letters_do() -> None:
    assert normalised_words("The  Cat, sat!\n“Yes”, it said…") == normalised_words("the cat sat yes it said")
    assert normalised_words("caf\u00e9") == normalised_words("cafe\u0301") != normalised_words("cafe")
    assert normalised_words("कि") != normalised_words("की")


@given(st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=30), st.integers(1, 5))
def test_ngrams_are_equal_where_their_words_are(words: list[str], ngram: int) -> None:
    hashes = ngram_hashes(words, ngram)
    grams = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
    assert len(hashes) == len(grams)
    assert len(set(zip(hashes.tolist(), grams, strict=True))) == len(set(hashes.tolist())) == len(set(grams))


@pytest.mark.parametrize(
    ("similar", "ngram", "says"), [(0.2, 13, "--similarity 0.2"), (1.1, 13, "1.1"), (0.8, 0, "--ngram 0")]
)
def test_settings_that_cannot_be_are_named(similar: float, ngram: int, says: str) -> None:
    with pytest.raises(DedupError, match=says):
        NearSettings(similar, ngram)


def test_what_is_not_seen_does_not_count() -> None:
    texts = ("hello wor\u00adld", "\ufeffhello world", "hello\u200b world", "hel\u2060lo\u200e world", "Hello, world")
    assert {tuple(normalised_words(text)) for text in texts} == {("hello", "world")}


def test_a_bar_counts_what_is_compared(capfd: pytest.CaptureFixture[str]) -> None:
    originals([np.zeros(40, np.uint64)], np.ones(40, bool), lambda _, others: np.zeros(len(others), bool))
    assert "40/40" in capfd.readouterr().err


def test_keys_are_the_same_however_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = np.random.default_rng(0).integers(0, 1 << 32, (100, PLACES), np.uint32)
    whole = band_keys(signatures, 13)
    monkeypatch.setattr(minhash, "_BLOCK", 7)
    assert np.array_equal(band_keys(signatures, 13), whole)
    assert whole.shape == (PLACES // 13, 100)
