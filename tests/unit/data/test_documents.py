"""Reading, tokenising and indexing documents; formats agree with each other and with Megatron; errors say what to mend."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import random
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from document_cases import TEXTS, TOKENIZER, stored, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.data.documents import Corpus, DocumentSource, open_corpus, parse_split
from megatron_sip.data.text_sources import TextBatch
from megatron_sip.data.token_store import TokenStore, TokenStoreWriter, bin_path, idx_path
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeSettings, _encode_all, tokenize_file
from megatron_sip.errors import DataError


@pytest.fixture
def settings(tmp_path: Path) -> TokenizeSettings:
    return TokenizeSettings(cache_dir=tmp_path / "cache")


def write_store(prefix: Path, documents: list[list[int]], dtype: type[np.generic] = np.uint16) -> Path:
    with TokenStoreWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(np.asarray(ids, dtype), np.asarray([len(ids)], np.int32))
    return prefix


# ---------------------------------------------------------------- formats


def test_jsonl_becomes_each_document_and_eos(tmp_path: Path, settings: TokenizeSettings) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    corpus = open_corpus([str(path)], TOKENIZER, settings)
    expected = [
        [*TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids, TOKENIZER.eos_token_id]
        for text in TEXTS
        if text
    ]
    assert stored(corpus) == expected
    (report,) = corpus.sources[0].reports
    assert (report.documents, report.empty_documents, report.tokens) == (7, 1, sum(map(len, expected)))


def test_special_tokens_in_a_document_stay_text(tmp_path: Path, settings: TokenizeSettings) -> None:
    corpus = open_corpus([str(write_jsonl(tmp_path / "a.jsonl", ["x <|im_end|><|eos|> y"]))], TOKENIZER, settings)
    (ids,) = stored(corpus)
    assert TOKENIZER.convert_tokens_to_ids("<|im_end|>") not in ids
    assert ids.index(TOKENIZER.eos_token_id) == len(ids) - 1
    assert TOKENIZER.decode(ids[:-1]) == "x <|im_end|><|eos|> y"


def test_bos_and_eos_are_configurable(tmp_path: Path, settings: TokenizeSettings) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ["dog"]))
    plain = TOKENIZER("dog", add_special_tokens=False).input_ids
    both = TokenizeSettings(cache_dir=settings.cache_dir, prepend_bos="on")
    neither = TokenizeSettings(cache_dir=settings.cache_dir, append_eos=False)
    assert stored(open_corpus([path], TOKENIZER, both)) == [[TOKENIZER.bos_token_id, *plain, TOKENIZER.eos_token_id]]
    assert stored(open_corpus([path], TOKENIZER, neither)) == [plain]


def two_zstd_frames(data: bytes) -> bytes:
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstandard.compress), (".json.zst", two_zstd_frames)],
)
def test_compressed_equals_plain(tmp_path: Path, settings: TokenizeSettings, suffix: str, compress) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS * 50)
    packed = tmp_path / f"packed{suffix}"
    packed.write_bytes(compress(plain.read_bytes()))
    assert stored(open_corpus([str(packed)], TOKENIZER, settings)) == stored(
        open_corpus([str(plain)], TOKENIZER, settings)
    )


def test_parquet_and_token_store_equal_jsonl(tmp_path: Path, settings: TokenizeSettings) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS * 50)
    pq.write_table(pa.table({"body": TEXTS * 50, "n": range(400)}), tmp_path / "t.parquet", row_group_size=64)
    expected = stored(open_corpus([str(plain)], TOKENIZER, settings))
    body = TokenizeSettings(text_field="body", cache_dir=settings.cache_dir)
    assert stored(open_corpus([str(tmp_path / "t.parquet")], TOKENIZER, body)) == expected
    tokenize_file(plain, tmp_path / "made.v1", DocumentEncoder.of(TOKENIZER, settings), settings)
    for name in ("made.v1", "made.v1.bin", "made.v1.idx", "made.*"):
        assert stored(open_corpus([str(tmp_path / name)], TOKENIZER, settings)) == expected


def test_worker_processes_change_nothing(tmp_path: Path, settings: TokenizeSettings) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS * 500)
    encoder = DocumentEncoder.of(TOKENIZER, settings)
    two = TokenizeSettings(workers=2)
    reports = [tokenize_file(source, tmp_path / name, encoder, s) for name, s in (("one", settings), ("two", two))]
    assert reports[0] == reports[1]
    for path in (bin_path, idx_path):
        assert path(tmp_path / "one").read_bytes() == path(tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype: type[np.generic]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [[1, 2, 3], [65_000], list(range(1000)), [7]]
    theirs = IndexedDataset(str(write_store(tmp_path / "ours", documents, dtype)))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs.index.dtype is dtype


def test_we_read_what_megatron_writes(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[[1, 2], [3]], [[4]], [], [[5, 6, 7]], []]  # documents of several sequences, and empty ones
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = TokenStore(tmp_path / "theirs")
    assert [ours[i].tolist() for i in range(len(ours))] == [[1, 2, 3], [4], [], [5, 6, 7], []]
    assert ours.num_tokens == 7


# ---------------------------------------------------------------- errors

GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            GOOD + '{"text": "cut',
            r"a\.jsonl:2: not valid JSON \(.*\): '\{\"text\": \"cut'; each line must be one object",
        ),
        (GOOD + "\n" + '{"text": oops}\n', r"a\.jsonl:3: not valid JSON"),
        (GOOD * 3000 + "[1, 2]\n", r"a\.jsonl:3001: expected a JSON object, found list: '\[1, 2\]'"),
        (GOOD + '{"txt": "a", "id": 1}\n', r"a\.jsonl:2: no field 'text'; this line has \['id', 'txt'\]"),
        ('{"text": 7}\n', r"a\.jsonl:1: field 'text' must be a string, found int"),
        ('{"text": null}\n', r"a\.jsonl:1: field 'text' must be a string, found NoneType"),
        ('{"text": "' + "x" * 500 + '"\n', r"a\.jsonl:1: not valid JSON .*x\.\.\.'; each"),
    ],
)
def test_broken_lines(tmp_path: Path, settings: TokenizeSettings, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        open_corpus([str(tmp_path / "a.jsonl")], TOKENIZER, settings)


def test_bytes_that_are_no_text(tmp_path: Path, settings: TokenizeSettings) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD.encode() + b'{"text": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        open_corpus([str(tmp_path / "a.jsonl")], TOKENIZER, settings)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncated_archives(tmp_path: Path, settings: TokenizeSettings, suffix: str, compress) -> None:
    lines = "".join(json.dumps({"text": os.urandom(200).hex()}) + "\n" for _ in range(2000))
    data = compress(lines.encode())
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (len(data) - 3, len(data) // 2):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"a\.jsonl.*(cut short or damaged|not valid JSON)"):
            open_corpus([str(path)], TOKENIZER, settings)
    path.write_bytes(b"not an archive at all")
    with pytest.raises(DataError, match=r"cannot be decompressed after line 0"):
        open_corpus([str(path)], TOKENIZER, settings)


def test_parquet_errors(tmp_path: Path, settings: TokenizeSettings) -> None:
    path = tmp_path / "t.parquet"
    for table, message in (
        (pa.table({"body": ["a"]}), r"t\.parquet: no column 'text'; it has \['body'\]"),
        (pa.table({"text": [1, 2]}), r"t\.parquet: column 'text' must hold strings, it holds int64"),
        (pa.table({"text": ["a", None]}), r"t\.parquet: row 2: column 'text' is null"),
    ):
        pq.write_table(table, path)
        with pytest.raises(DataError, match=message):
            open_corpus([str(path)], TOKENIZER, settings)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as parquet"):
        open_corpus([str(path)], TOKENIZER, settings)


def test_token_store_errors(tmp_path: Path, settings: TokenizeSettings) -> None:
    prefix = write_store(tmp_path / "s", [[1, 2, 3], [4, len(TOKENIZER)]])
    with pytest.raises(
        DataError, match=rf"s\.bin: token id {len(TOKENIZER)}, but the vocabulary has only {len(TOKENIZER)}"
    ):
        open_corpus([str(prefix)], TOKENIZER, settings)
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-2])
    with pytest.raises(DataError, match=r"s\.bin: 8 bytes, but its index needs 10; the file is cut short"):
        TokenStore(prefix)
    whole = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"s\.idx: .* too few for 2 sequences"):
        TokenStore(prefix)
    idx_path(prefix).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"s\.idx: not an index of Megatron's format"):
        TokenStore(prefix)
    bin_path(prefix).unlink()
    with pytest.raises(DataError, match=r"s\.bin: no such file"):
        TokenStore(prefix)


def damaged_index(prefix: Path, draw: random.Random) -> None:
    content = bytearray(idx_path(prefix).read_bytes())
    for _ in range(draw.choice([1, 3])):
        content[draw.randrange(len(content))] = draw.choice([0, 127, 128, 255, draw.randrange(256)])
    idx_path(prefix).write_bytes(content)


def test_a_damaged_index_is_read_or_refused_but_never_leads_outside(tmp_path: Path) -> None:
    draw = random.Random(20261128)
    whole = idx_path(write_store(tmp_path / "s", [[i] * (i + 1) for i in range(10)])).read_bytes()
    refused = 0
    for _ in range(300):
        idx_path(tmp_path / "s").write_bytes(whole)
        damaged_index(tmp_path / "s", draw)
        try:
            store = TokenStore(tmp_path / "s")
        except DataError:
            refused += 1
            continue
        assert [len(store[i]) for i in range(len(store))] == store.lengths.tolist()
    assert refused > 200


def test_a_store_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    write_store(tmp_path / "s", [[1, 2]])
    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(DataError, match=r"s\.idx: cannot be read \(Permission denied\)"):
        TokenStore(tmp_path / "s")


def test_bytes_after_the_last_token_do_no_harm(tmp_path: Path) -> None:
    prefix = write_store(tmp_path / "s", [[1, 2], [3]])
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes() + b"\0")
    store = TokenStore(prefix)
    assert [store[i].tolist() for i in range(2)] == [[1, 2], [3]]


def test_tokenizers_that_cannot_serve(settings: TokenizeSettings) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        DocumentEncoder.of(tokenizer, settings)
    with pytest.raises(DataError, match="str has no fast backend"):
        DocumentEncoder.of("tokenizer", settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------- splits


@given(st.integers(0, 400), st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any))
def test_splits_are_disjoint_cover_everything_and_have_their_share(documents: int, weights: list[int]) -> None:
    source = DocumentSource.__new__(DocumentSource)
    source.lengths = np.full(documents, 5)
    splits = Corpus((source,), (Fraction(1),), 10).split(",".join(map(str, weights)))
    parts = [splits[name].documents(0) for name in ("train", "valid", "test")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(documents))
    for part, weight in zip(parts, weights, strict=False):
        assert abs(len(part) - documents * weight / sum(weights)) <= 1


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0", "1,,2"])
def test_bad_splits(split: str) -> None:
    with pytest.raises(DataError, match="expected 1 to 3 non-negative numbers for train,valid,test like 969,30,1"):
        parse_split(split)


def test_the_split_does_not_depend_on_the_order_of_files(tmp_path: Path, settings: TokenizeSettings) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [f"first {i}" for i in range(40)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"second {i}" for i in range(30)])

    def held_out(data_path: list[Path]) -> set[str]:
        valid = open_corpus(list(map(str, data_path)), TOKENIZER, settings).split("8,2")["valid"]
        return {TOKENIZER.decode(valid.sources[0].tokens(i)) for i in valid.documents(0)}

    assert held_out([a, b]) == held_out([b, a])
    assert len(held_out([a, b])) == 14


# ---------------------------------------------------------------- the command-line tools


ROOT = Path(__file__).parents[3]


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")


def test_demo_corpus(tmp_path: Path, settings: TokenizeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tmp_path / "topics.jsonl"
    run_tool(monkeypatch, "write_demo_corpus.py", "--save", str(save))
    written = save.stat().st_mtime_ns
    run_tool(monkeypatch, "write_demo_corpus.py", "--save", str(save))
    assert save.stat().st_mtime_ns == written  # an unchanged corpus keeps its tokenised cache
    texts = [json.loads(line)["text"] for line in save.read_text(encoding="utf-8").splitlines()]
    assert len(stored(open_corpus([str(save)], TOKENIZER, settings))) == len(texts) > 45
    for text in texts:  # no document is a section of another: a held-out one was not seen in training
        middle = text[len(text) // 2 :][:200]
        assert sum(middle in other for other in texts) == 1


def test_a_dead_worker_is_an_error_not_a_hang() -> None:
    def batches():
        yield TextBatch(["fine"], 1)
        for child in multiprocessing.active_children():
            child.kill()
        yield from (TextBatch(["never"], 2) for _ in range(50))

    encoder = DocumentEncoder.of(TOKENIZER, TokenizeSettings())
    with pytest.raises(RuntimeError, match=r"tokenising process died .* fewer than 2 workers"):
        list(_encode_all(batches(), encoder, workers=2))
