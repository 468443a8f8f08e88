"""`dedup`: what repeats an earlier document goes, by reason; killed anywhere, the same bytes; RedPajama's own signatures."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_cases import read_corpus, write_corpus
from duplicate_cases import planted_pair, vocabulary
from killed_commands import kills_survived
from prepare_cases import files_below, run

from megatron_sip.corpus.dedup import DedupWork, dedup
from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.minhash import DedupError, NearSettings
from megatron_sip.errors import DataError

WORDS = vocabulary(2)


def texts(count: int, first: int = 0) -> list[str]:
    """Documents that have nothing in common."""
    return [" ".join(planted_pair(WORDS, 0.9, seed, length=120)[0]) for seed in range(first, first + count)]


def near(number: int) -> str:
    """Like the document of that number, but for its end."""
    return " ".join(planted_pair(WORDS, 0.9, number, length=120)[1])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    own = texts(20)
    spelt = own[3].upper().replace(" ", "  ") + "!"
    return write_corpus(
        tmp_path / "corpus",
        {
            "0-a": [*own[:10], own[0], "short", near(4)],
            "1-b": [near(1), spelt, *own[10:], "Short."],
            "2-c": [],
            "3-d": [near(12), near(4), *texts(3, first=100)],
        },
    )


def kept(folder: Path) -> dict[str, list[str]]:
    return {name: [document.id for document in found] for name, found in read_corpus(folder).items()}


def test_the_first_of_each_stays_and_the_others_are_counted_by_reason(corpus: Path, tmp_path: Path) -> None:
    manifest = run("dedup", "--data-path", corpus, "--out", tmp_path / "out")
    before = read_corpus(corpus)
    gone = {"0-a/10", "0-a/12", "1-b/0", "1-b/1", "1-b/12", "3-d/0", "3-d/1"}
    assert kept(tmp_path / "out") == {
        name: [document.id for document in documents if document.id not in gone] for name, documents in before.items()
    }
    assert manifest["dropped"] == {"exact": 4, "near": 3}  # near(4) is there twice: the second time as it was the first
    assert manifest["documents"]["read"] == 13 + 13 + 5
    assert manifest["documents"]["kept"] == 31 - 7
    assert manifest["documents"]["by_subset"] == {"0-a-subset": 11, "1-b-subset": 10, "3-d-subset": 3}
    assert [shard["name"] for shard in manifest["shards"]] == ["0-a", "1-b", "2-c", "3-d"]
    again = run("dedup", "--data-path", tmp_path / "out", "--out", tmp_path / "again")
    assert again["dropped"] == {}
    assert kept(tmp_path / "again") == kept(tmp_path / "out")


def test_only_the_same_words_are_repetitions_where_that_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    manifest = run("dedup", "--data-path", corpus, "--out", tmp_path / "out", "--exact-only")
    assert manifest["dropped"] == {"exact": 4}


def test_texts_of_signs_alone_are_compared_as_they_are(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", {"a": ["!!!", "??? ...", " !!!\n", "---"]})
    for name, flags in (("exact", ["--exact-only"]), ("near", [])):
        run("dedup", "--data-path", corpus, "--out", tmp_path / name, *flags)
        assert kept(tmp_path / name) == {"a": ["a/0", "a/1", "a/3"]}


def test_killed_anywhere_it_ends_with_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    words = ("dedup", "--data-path", corpus, "--out")
    run(*words, tmp_path / "whole")
    assert kills_survived(*words, tmp_path / "killed") >= 5
    assert files_below(tmp_path / "killed") == files_below(tmp_path / "whole")


def test_another_corpus_or_other_settings_are_refused(corpus: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    run("dedup", "--data-path", corpus, *out)
    with pytest.raises(CorpusError, match=r"differs in near.similarity \(0.8 there, 0.9 here\)"):
        run("dedup", "--data-path", corpus, *out, "--similarity", "0.9")
    other = write_corpus(tmp_path / "other", {"a": ["x", "x"]})
    with pytest.raises(CorpusError, match="differs in made_from"):
        run("dedup", "--data-path", other, *out)
    with pytest.raises(CorpusError, match="has no manifest"):
        run("dedup", "--data-path", tmp_path, "--out", tmp_path / "x")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--exact-only", "--similarity", "0.7"], "--similarity: of no effect with --exact-only"),
        (["--similarity", "2"], "--similarity 2.0"),
        (["--ngram", "90"], "--ngram 90"),
        (["--workers", "0"], "--workers 0"),
    ],
)
def test_flags_that_cannot_be_are_named(flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises((DedupError, CorpusError), match=says):
        run("dedup", "--data-path", write_corpus(tmp_path / "c", {"a": ["x"]}), "--out", tmp_path / "out", *flags)


def write_signatures(path: Path, rows: dict[str, list[bytes] | None], column: str = "signature_sim0.8") -> Path:
    table = pa.table({"id": list(rows), column: pa.array(list(rows.values()), pa.list_(pa.binary()))})
    pq.write_table(table, path)
    return path


def test_redpajama_s_signatures_say_what_is_near(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", {"a": ["one", "two", "three"], "b": ["four", "five", "two", "six"]})
    first = {"a/0": [b"1", b"2"], "a/1": [b"3", b"4"], "a/2": [b"2", b"1"], "not/kept": [b"9", b"9"]}
    second = {"b/0": [b"5", b"4"], "b/1": None, "b/2": [b"3", b"9"], "b/3": None}
    files = [write_signatures(tmp_path / "0.parquet", first), write_signatures(tmp_path / "1.parquet", second)]
    manifest = run("dedup", "--data-path", corpus, "--out", tmp_path / "out", "--signatures", *files)
    assert kept(tmp_path / "out") == {"a": ["a/0", "a/1", "a/2"], "b": ["b/1", "b/3"]}
    assert manifest["dropped"] == {"exact": 1, "near": 1}


def test_signatures_that_are_no_answer_are_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", {"a": ["one", "two"]})
    rows: dict[str, list[bytes] | None] = {"a/0": [b"1", b"2"]}

    def refused(error: type[Exception], says: str, path: Path, similarity: float = 0.8) -> None:
        with pytest.raises(error, match=says):
            dedup(DedupWork(corpus, tmp_path / f"out-{path.stem}", NearSettings(similarity), (path,)))

    refused(DedupError, "no row for 1 of the 2 documents of a, as for number 2", write_signatures(tmp_path / "1", rows))
    refused(DataError, "differ in length", write_signatures(tmp_path / "2", rows | {"a/1": [b"1"]}))
    refused(DataError, "no column 'signature_sim0.8'; it has id, sim", write_signatures(tmp_path / "3", rows, "sim"))
    assert not (tmp_path / "out-3").exists(), "told before hours of sketches"
    null = pa.table({"id": ["a/0"], "signature_sim0.8": pa.array([[b"1", None]], pa.list_(pa.binary()))})
    pq.write_table(null, tmp_path / "6")
    refused(DataError, r"6: 0 ids and 1 bands of rows 1 to 1 are null", tmp_path / "6")
    ids = pa.table(
        {"id": pa.array(["a/0", None]), "signature_sim0.8": pa.array([[b"1"], [b"2"]], pa.list_(pa.binary()))}
    )
    pq.write_table(ids, tmp_path / "7")
    refused(DataError, r"7: 1 ids and 0 bands of rows 1 to 2 are null", tmp_path / "7")
    refused(DataError, "no signature", write_signatures(tmp_path / "8", {"a/0": [], "a/1": []}))
    refused(DataError, "no signature", write_signatures(tmp_path / "4", {"a/0": None, "a/1": None}))
    refused(DedupError, r"of 0\.7, 0\.8, 0\.9, 1\.0", tmp_path / "1", 0.75)
    (tmp_path / "5").write_text("x")
    refused(DataError, "cannot be read as parquet", tmp_path / "5")
