"""Shards as they are published: both of RedPajama's layouts, SlimPajama, others; what is wrong in them is named by row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_corpus_cases import GOOD, as_signals, redpajama_rows, text_of, write_lines, write_redpajama

from megatron_sip.config.corpus_flags import text_files
from megatron_sip.corpus import shards
from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.quality import QualitySettings
from megatron_sip.corpus.rules import Document
from megatron_sip.corpus.shards import Fields, RestOfShardError, read_shard, shards_in
from megatron_sip.errors import DataError

PLACE = "2023-06/0003/en_head.json.gz"
REDPAJAMA = Fields("raw_content", signals=True, redpajama=True)
SCORES = [GOOD | {"rps_doc_word_count": 100.0 + i} for i in range(6)]


def read(path: Path, fields: Fields = REDPAJAMA) -> list[Document | DataError]:
    [shard] = shards_in((path,), fields)
    found = [row.found for row in read_shard(shard, fields)]
    if rest := [each for each in found if isinstance(each, RestOfShardError)]:
        assert found[-len(rest) :] == rest
        raise rest[0]
    return found


def test_two_files_side_by_side_and_records_of_the_hub_are_the_same_documents(tmp_path: Path) -> None:
    beside = read(write_redpajama(tmp_path, PLACE, SCORES))
    documents, signals = redpajama_rows(PLACE, SCORES)
    hub = [
        {
            "raw_content": document["raw_content"],
            "doc_id": row["id"],
            "meta": json.dumps(row["metadata"]),
            "quality_signals": json.dumps(row["quality_signals"]),
        }
        for document, row in zip(documents, signals, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(hub), tmp_path / "hub.parquet")
    assert read(write_lines(tmp_path / "hub.jsonl", hub)) == read(tmp_path / "hub.parquet") == beside
    assert beside == [
        Document(f"{PLACE}/{i}", text_of(i), "en_head", row["quality_signals"]) for i, row in enumerate(signals)
    ]
    assert read(tmp_path / "documents" / PLACE, replace(REDPAJAMA, signals=False)) == [
        replace(document, signals=None) for document in beside if isinstance(document, Document)
    ]


def edited(tmp_path: Path, edit: Any) -> Path:
    """A shard of two files whose records `edit` changes."""
    documents, signals = redpajama_rows(PLACE, SCORES)
    edit(documents, signals)
    write_lines(tmp_path / "quality_signals/2023-06/0003/en_head.signals.json.gz", signals)
    return write_lines(tmp_path / "documents" / PLACE, documents)


def test_a_row_without_signals_and_one_that_is_no_record_move_no_others(tmp_path: Path) -> None:
    def edit(documents: list[Any], signals: list[Any]) -> None:
        documents[1] = '{"raw_content": "half a rec'
        documents[5] = {"raw_content": None}
        del signals[3], signals[1]  # RedPajama's program could not read the row, either

    found = read(edited(tmp_path, edit))
    assert isinstance(found[1], DataError)
    assert f"{PLACE}:2" in str(found[1])
    assert isinstance(found[5], DataError)
    assert "'raw_content' holds no text: NoneType" in str(found[5])
    counts = {i: each.signals for i, each in enumerate(found) if isinstance(each, Document)}
    assert counts[3] == {}
    assert {i: signals["rps_doc_word_count"][0][2] for i, signals in counts.items() if signals} == {
        0: 100,
        2: 102,
        4: 104,
    }


def swap(documents: list[Any], signals: list[Any]) -> None:
    signals[2], signals[3] = signals[3], signals[2]


def other_file(documents: list[Any], signals: list[Any]) -> None:
    signals[2]["id"] = "2023-06/0004/en_head.json.gz/2"


def other_page(documents: list[Any], signals: list[Any]) -> None:
    documents[2]["url"] = "https://example.org/other"


def shifted(documents: list[Any], signals: list[Any]) -> None:
    del documents[2]


def fewer_documents(documents: list[Any], signals: list[Any]) -> None:
    del documents[2:]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (swap, "not of each other"),
        (other_file, r"signals.json.gz:3: the id '2023-06/0004/en_head.json.gz/2' is of another file"),
        (other_page, r"en_head.json.gz:3 \(.*/2 there, https://example.org/other here\)"),
        (shifted, "not of each other"),
        (fewer_documents, r"en_head.json.gz: ends before the document of the signals '.*/2'"),
    ],
)
def test_two_files_that_are_not_of_each_other_are_named_with_the_row(edit: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read(edited(tmp_path, edit))


def no_number(row: dict[str, Any]) -> Any:
    return {**row, "id": "2023-06/0003/en_head.json.gz/two"}


def half_a_line(row: dict[str, Any]) -> Any:
    return json.dumps(row)[:50]


def a_list(row: dict[str, Any]) -> Any:
    return {**row, "quality_signals": [1]}


@pytest.mark.parametrize("spoil", [no_number, half_a_line, a_list])
def test_a_broken_row_of_signals_is_one_broken_row(spoil: Any, tmp_path: Path) -> None:
    def edit(documents: list[Any], signals: list[Any]) -> None:
        signals[2] = spoil(signals[2])

    found = read(edited(tmp_path, edit))
    assert [type(each) for each in found] == [Document, Document, DataError, Document, Document, Document]
    assert "signals.json.gz:3 is not a row of quality signals" in str(found[2])
    assert [each.signals for each in found if isinstance(each, Document)] == [
        as_signals(scores) for i, scores in enumerate(SCORES) if i != 2
    ]


def test_documents_whose_signals_are_null_or_not_there_have_none(tmp_path: Path) -> None:
    def edit(documents: list[Any], signals: list[Any]) -> None:
        signals[0]["quality_signals"] = None
        del signals[5]

    found = read(edited(tmp_path, edit))
    assert [each.signals == {} for each in found if isinstance(each, Document)] == [True, *[False] * 4, True]
    assert QualitySettings("gopher").rules()[0].reason(cast("Document", found[0])) == "signals/missing"


def test_a_parquet_row_without_text_is_one_broken_row(tmp_path: Path) -> None:
    texts = ["a", None, "b", b"caf\xe9", "c"] + [f"later {i}" for i in range(600)]
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    broken = pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", Fields("text"))
    assert [each.text if isinstance(each, Document) else None for each in found] == ["a", None, "b", None, *texts[4:]]
    assert "a.parquet:2: the field 'text' holds no text: NoneType" in str(found[1])
    assert "a.parquet: row 4 is not text in UTF-8" in str(found[3])
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body\.text'; it has text"):
        read(tmp_path / "a.parquet", Fields("body.text"))


def test_ids_are_of_one_document_each(tmp_path: Path) -> None:
    records = [{"text": "a"}, {"text": "b"}]
    paths = tuple(write_lines(tmp_path / name, records) for name in ("2023/en/p.jsonl", "2024/en/p.jsonl"))
    found = [row.found for each in shards_in(paths, Fields("text")) for row in read_shard(each, Fields("text"))]
    ids = [each.id for each in found if isinstance(each, Document)]
    assert ids == [f"{tmp_path.name}/{year}/en/p.jsonl/{row}" for year in (2023, 2024) for row in (0, 1)]


def test_an_id_or_a_subset_that_is_null_is_a_broken_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "key": None}, {"text": "b", "key": 1.5}, [["text", "c"]]])
    for fields in (Fields("text", "key"), Fields("text", subset="key")):
        first, second, third = read(path, fields)
        assert "a.jsonl:1: the field 'key' holds neither text nor a number: NoneType" in str(first)
        assert isinstance(second, Document)
        assert "1.5" in (second.id, second.subset)
        assert "a.jsonl:3 is not a JSON object" in str(third)


def test_only_redpajama_s_ids_name_a_subset(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", [{"text": "a", "doc_id": "x/en_head.json.gz/7", "key": "https://a.org/b.json/1"}]
    )
    assert read(path, Fields("text", "key")) == [Document("https://a.org/b.json/1", "a", "a")]
    assert read(path, Fields("text")) == [Document(f"{tmp_path.name}/a.jsonl/0", "a", "a")]
    assert read(path, Fields("text", redpajama=True)) == [Document("x/en_head.json.gz/7", "a", "en_head")]


def test_a_linked_folder_of_documents_has_its_signals_beside_the_link(tmp_path: Path) -> None:
    write_redpajama(tmp_path / "rp", PLACE, SCORES)
    (tmp_path / "rp/documents").rename(tmp_path / "elsewhere")
    (tmp_path / "rp/documents").symlink_to(tmp_path / "elsewhere")
    (path,) = text_files([str(tmp_path / "rp/documents/**/*.json.gz")])
    assert [each.signals for each in read(path) if isinstance(each, Document)] == list(map(as_signals, SCORES))


def test_signals_of_the_hub_s_records_are_looked_for_in_the_fields_that_are_given(tmp_path: Path) -> None:
    record = {"body": {"text": "a"}, "doc_id": "x/en_head.json.gz/7", "quality_signals": json.dumps(as_signals(GOOD))}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "hub.parquet")
    found = read(tmp_path / "hub.parquet", replace(REDPAJAMA, text="body.text"))
    assert found == [Document("x/en_head.json.gz/7", "a", "en_head", as_signals(GOOD))]
    (tmp_path / "empty.json.gz").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"empty\.json\.gz: cannot be decompressed"
    ):  # when it is made, where it may be counted
        read(tmp_path / "empty.json.gz")


@pytest.mark.parametrize("cut", ["documents", "quality_signals"])
def test_a_shard_that_is_cut_short_is_named(cut: str, tmp_path: Path) -> None:
    path = write_redpajama(tmp_path, PLACE, SCORES * 100)
    [broken] = (tmp_path / cut).rglob("*.gz")
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"{broken.name}: cannot be decompressed after line \d+"):
        read(path)


def test_documents_without_signals_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = write_redpajama(tmp_path, PLACE, SCORES)
    signals = tmp_path / "quality_signals/2023-06/0003/en_head.signals.json.gz"
    signals.unlink()
    with pytest.raises(CorpusError, match=rf"neither a file {signals} nor a field 'quality_signals'.*--keep all"):
        shards_in((path,), REDPAJAMA)


def test_a_hub_record_whose_signals_are_null_or_no_json(tmp_path: Path) -> None:
    records = [{"raw_content": "a", "quality_signals": "{}"}, {"raw_content": "b", "quality_signals": None}]
    records.append({"raw_content": "c", "quality_signals": "{"})
    found = read(write_lines(tmp_path / "hub.jsonl", records))
    assert [each.signals for each in found[:2] if isinstance(each, Document)] == [{}, {}]
    assert "hub.jsonl:3 is not a record with 'quality_signals'" in str(found[2])


@pytest.mark.parametrize("name", ["chunk.jsonl.zst", "chunk.jsonl.gz", "chunk.parquet"])
def test_slimpajama_counts_by_its_set(name: str, tmp_path: Path) -> None:
    records = [
        {"text": text_of(i), "meta": {"redpajama_set_name": f"RedPajama{'C4' if i % 2 else 'Wiki'}"}} for i in (0, 1)
    ]
    path = tmp_path / "train" / name
    path.parent.mkdir()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        write_lines(path, records)
    assert read(path, Fields("text", subset="meta.redpajama_set_name")) == [
        Document(f"train/{name}/0", text_of(0), "RedPajamaWiki"),
        Document(f"train/{name}/1", text_of(1), "RedPajamaC4"),
    ]


def test_fields_of_one_s_own(tmp_path: Path) -> None:
    records: list[Any] = [{"body": {"text": "a"}, "key": 7, "src": "x"}, "", {"body": {"text": "b"}, "src": "y"}]
    found = read(write_lines(tmp_path / "a.jsonl", records), Fields("body.text", "key", "src"))
    assert found[0] == Document("7", "a", "x")
    assert "a.jsonl:3 is not a record with the field 'key'; it has body, src" in str(found[1])


def test_a_text_that_no_later_command_would_read_is_a_broken_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_DOCUMENT_BYTES", 100)
    pq.write_table(pa.table({"text": ["a", "b" * 101, "c" * 100]}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", Fields("text"))
    assert [type(each) for each in found] == [Document, DataError, Document]
    assert "a.parquet:2: 101 characters; a document this large" in str(found[1])
