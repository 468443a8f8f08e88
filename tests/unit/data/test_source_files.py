"""Which files a data path names: format and name from what the user wrote, identity from what links lead to."""

from __future__ import annotations

import gzip
import io
import json
import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tiny_tokenizer import MULTILINGUAL, byte_level_tokenizer

from megatron_sip.data.documents import open_corpus
from megatron_sip.data.source_files import parse_data_path
from megatron_sip.data.token_store import TokenStoreWriter
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.errors import DataError

TOKENIZER = byte_level_tokenizer()
LINES = "".join(json.dumps({"text": text}) + "\n" for text in MULTILINGUAL).encode()


def parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": MULTILINGUAL}), stream)
    return stream.getvalue()


CONTENTS = {
    "a.jsonl": LINES,
    "a.json": LINES,
    "a.ndjson.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.parquet": parquet(),
}


def linked(folder: Path, name: str, content: bytes, blob: str = "0a1b2c") -> Path:
    """`content` as the hub's cache has it: a blob without suffix, and a relative link to it with the name."""
    for part in ("blobs", "snapshots/r1"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / blob).write_bytes(content)
    (folder / "snapshots/r1" / name).symlink_to(f"../../blobs/{blob}")
    return folder / "snapshots/r1" / name


def stored(paths: list[Path], cache: Path) -> list[list[int]]:
    corpus = open_corpus(list(map(str, paths)), TOKENIZER, TokenizeSettings(cache_dir=cache))
    return [source.tokens(i).tolist() for source in corpus.sources for i in range(len(source))]


@pytest.mark.parametrize("name", CONTENTS)
def test_a_link_to_a_blob_without_suffix_is_read_as_its_own_name_says(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    expected = stored([tmp_path / name], tmp_path / "plain")
    assert len(expected) == len(MULTILINGUAL)
    one = linked(tmp_path / "hub", name, CONTENTS[name])
    two = tmp_path / "mine" / name
    two.parent.mkdir()
    two.symlink_to(one)
    cache = tmp_path / "cache"
    for path in (one, two, two.parent / "*", one.parent / "**" / "a.*"):
        assert stored([path], cache) == expected
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]  # one file under one name is tokenised once
    assert entry.name.startswith(name)


def test_one_blob_under_two_formats_is_two_texts(tmp_path: Path) -> None:
    frames = zstandard.compress(LINES)
    good = linked(tmp_path, "a.jsonl.zst", frames)
    (tmp_path / "snapshots/r1/a.jsonl").symlink_to("../../blobs/0a1b2c")
    assert len(stored([good], tmp_path / "cache")) == len(MULTILINGUAL)
    with pytest.raises(DataError, match=r"a\.jsonl:1: not valid JSON"):
        stored([tmp_path / "snapshots/r1/a.jsonl"], tmp_path / "cache")


def test_a_pair_of_linked_token_files(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "made", np.uint16) as writer:
        writer.add(np.asarray([5, 6, 7]), np.asarray([3]))
    for suffix, blob in ((".bin", "f00"), (".idx", "ba4")):
        linked(tmp_path / "hub", f"web.v1{suffix}", (tmp_path / f"made{suffix}").read_bytes(), blob)
    folder = tmp_path / "hub/snapshots/r1"
    for name in ("web.v1", "web.v1.bin", "web.*"):
        assert stored([folder / name], tmp_path / "cache") == [[5, 6, 7]]
    with pytest.raises(DataError, match=r"web\.v1 is in both"):
        parse_data_path(["1", str(folder / "web.v1"), "2", str(folder / "web.v1.idx")])


def test_one_file_under_two_names_is_read_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = linked(tmp_path, "b.jsonl", LINES)
    (path.parent / "a.jsonl").symlink_to("../../blobs/0a1b2c")
    with caplog.at_level(logging.WARNING):
        assert len(stored([path.parent / "*.jsonl"], tmp_path / "cache")) == len(MULTILINGUAL)
    assert "b.jsonl is the same file as" in caplog.text
    with pytest.raises(DataError, match=r"is in both .*a\.jsonl' and .*b\.jsonl'"):
        parse_data_path(["1", str(path.parent / "a.jsonl"), "1", str(path)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.bin"])
def test_a_link_to_a_file_that_was_not_fetched_is_refused_in_globs_too(tmp_path: Path, name: str) -> None:
    linked(tmp_path, "good.jsonl", LINES)
    (tmp_path / "snapshots/r1" / name).symlink_to("../../blobs/missing")
    for path in (name, "*"):
        with pytest.raises(DataError, match=rf"{name} is a link to \.\./\.\./blobs/missing, which is not there: fetch"):
            parse_data_path([str(tmp_path / "snapshots/r1" / path)])


@pytest.mark.parametrize(
    ("content", "command"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s123--4d7a.jsonl\n", "git annex get"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_pointer_in_place_of_the_file_says_how_to_fetch_it(
    tmp_path: Path, name: str, content: bytes, command: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: a pointer to the file, .* {command}"):
        stored([tmp_path / name], tmp_path / "cache")


def test_what_a_glob_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "README.md", "b.jsonl.xz"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "folder.jsonl").mkdir()
    with caplog.at_level(logging.WARNING):
        (spec,) = parse_data_path([str(tmp_path / "*")])
    assert spec.paths == (tmp_path / "a.jsonl",)
    assert "matches 2 files that are left out" in caplog.text


@pytest.mark.parametrize("entry", ["x" * 5000, "/", "~nobody-by-this-name/a.jsonl", "folder.jsonl", "loop.jsonl"])
def test_entries_that_name_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match="--input"):
        parse_data_path([entry], "--input")


def write_lines(path: Path) -> Path:
    path.write_bytes(LINES)
    return path


def test_data_path_errors(tmp_path: Path) -> None:
    a, b = (str(write_lines(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    (tmp_path / "notes.txt").write_text("x")
    for data_path, message in (
        ([], "--data-path is empty"),
        ([str(tmp_path / "none.jsonl")], "no such file: '.*none.jsonl'"),
        ([str(tmp_path / "*.parquet")], "no file matches '.*parquet'"),
        ([str(tmp_path)], r"is a folder; name its files, e.g. '.*/\*\.jsonl'"),
        ([str(tmp_path / "notes.txt")], "notes.txt' has an unknown format; readable are .jsonl"),
        (["0.5", a, b], "b.jsonl' has no weight"),
        (["0.5", "0.2", a], "'0.2' follows a weight"),
        ([a, "0.5"], "ends with the weight '0.5'"),
        (["-1", a], "weight '-1' must be positive"),
        (["1", a, "2", str(tmp_path / "*.jsonl")], "a.jsonl is in both"),
    ):
        with pytest.raises(DataError, match=message):
            parse_data_path(data_path)


def test_data_path_forms(tmp_path: Path) -> None:
    a, b = (write_lines(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    for data_path in ([str(tmp_path / "*.jsonl")], [str(b), str(a)], [str(a), str(b), str(a)]):
        (spec,) = parse_data_path(data_path)
        assert spec.paths == (a, b)
        assert spec.weight is None
    specs = parse_data_path(["0.7", str(b), "3e-1", str(a)])
    assert [(spec.weight, spec.paths) for spec in specs] == [(Fraction(7, 10), (b,)), (Fraction(3, 10), (a,))]
