"""What files hold is read exactly, or refused with file and place; nothing ends early, nothing else is raised."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_sip.data import text_sources
from megatron_sip.data.text_sources import read_texts
from megatron_sip.errors import DataError


def texts_of(path: Path, text_field: str = "text") -> list[str]:
    return [text for batch in read_texts(path, text_field) for text in batch.texts]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(table: pa.Table, **options: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


# ---------------------------------------------------------------- JSON lines


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (rb"half \ud83d here", r"U\+D83D, character 6"),
        (rb"\uDE42\ud83d", r"U\+DE42, character 1"),  # the halves in the wrong order
        (b"raw \xed\xa0\xbd", r"U\+D83D, character 5"),  # json lets these bytes pass
    ],
)
def test_half_a_surrogate_pair_names_file_line_and_mend(tmp_path: Path, text: bytes, found: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": "' + text + b'"}\n')
    message = (
        rf"a\.jsonl:3: field 'text' holds half a surrogate pair \({found}\): .*; write the whole character, or U\+FFFD"
    )
    with pytest.raises(DataError, match=message):
        list(read_texts(path, "text"))


def test_whole_surrogate_pairs_and_line_separators_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["smile 🙂", "one\u2028two\u2029three\x85four"]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=i == 0) + "\n" for i, t in enumerate(texts)))
    assert next(iter(read_texts(path, "text"))).texts == texts


def test_a_parquet_string_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.asarray([0, 2, 3], np.int32).tobytes())
    latin = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ab\xe9")])
    pq.write_table(pa.table({"text": latin}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: row 2: column 'text' is not UTF-8"):
        list(read_texts(tmp_path / "t.parquet", "text"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"1" * 5000, r"a\.jsonl:2: not valid JSON \(Exceeds the limit \(4300 digits\)"),
        (b"[" * 100_000 + b"]" * 100_000, r"a\.jsonl:2: not valid JSON \(maximum recursion depth"),
        (b'{"a":' * 100_000, r"a\.jsonl:2: not valid JSON \(maximum recursion depth"),
    ],
)
def test_json_that_python_cannot_hold_names_its_line(tmp_path: Path, value: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("good") + b'{"text": "x", "n": ' + value + b"}\n")
    with pytest.raises(DataError, match=message) as caught:
        texts_of(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_record_of_very_many_fields_is_not_listed_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"field{i:04}": i for i in range(5000)}) + "\n")
    with pytest.raises(
        DataError, match=r"no field 'text'; this line has \['field0000', .*\] and 4980 more\."
    ) as caught:
        texts_of(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n \n\r\n", []),
        (b"\xef\xbb\xbf" + lines("with a mark", "two"), ["with a mark", "two"]),
        (lines("one", "two").replace(b"\n", b"\r\n"), ["one", "two"]),
        (lines("one", "two")[:-1], ["one", "two"]),
        (lines("one") + b"\n\n" + lines("two"), ["one", "two"]),
    ],
    ids=["empty", "blank", "byte-order-mark", "crlf", "no-last-newline", "blank-between"],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_line_ends_marks_and_empty_files(
    tmp_path: Path, content: bytes, expected: list[str], compress: Callable
) -> None:
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[compress]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content))
    assert texts_of(tmp_path / f"a.jsonl{suffix}") == expected


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "MAX_DOCUMENT_BYTES", 1 << 20)
    bomb = lines("good") + b'{"text": "' + b"x" * (200 << 20)
    for name, content in (("a.jsonl.gz", gzip.compress(bomb, 1)), ("a.jsonl.zst", zstandard.compress(bomb))):
        (tmp_path / name).write_bytes(content)
        tracemalloc.start()
        with pytest.raises(
            DataError, match=rf"{name}:2: longer than 1 MiB: '\{{\"text\": \"xxx.*each line must be one object"
        ):
            texts_of(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20


# ---------------------------------------------------------------- archives


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_of_any_window_is_read(tmp_path: Path, window_log: int) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # of unknown size: keeps its window
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(lines("one", "two")) + stream.flush())
    assert texts_of(tmp_path / "a.jsonl.zst") == ["one", "two"]


def test_frames_and_members_follow_one_another(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"  # as pzstd and seekable zstd write them
    one, two = (zstandard.compress(lines(text)) for text in ("one", "two"))
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + one + skippable + two + zstandard.compress(b"") + skippable)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("one")) + gzip.compress(lines("two")))
    for name in ("a.jsonl.zst", "a.jsonl.gz"):
        assert texts_of(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_an_archive_that_ends_early_or_goes_on_with_something_else(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    first, second = (compress(lines(*(f"{name} {i}" for i in range(50)))) for name in ("one", "two"))
    broken = [first + second[:size] for size in range(1, len(second))]
    for content in (b"", first[:-1], first + b"garbage after the end", *broken):
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=rf"a\.jsonl\{suffix}(: cannot be decompressed after line|:\d+: not valid JSON)"
        ):
            texts_of(path)
    path.write_bytes(first + second)
    assert len(texts_of(path)) == 100


def test_well_compressed_zstd_is_read_in_linear_time(tmp_path: Path) -> None:
    line = lines("x" * 1000)

    def seconds(megabytes: int) -> float:
        started = time.process_time()
        assert sum(len(batch.texts) for batch in read_texts(tmp_path / "a.jsonl.zst", "text")) == megabytes * 1000
        return time.process_time() - started

    least = []
    for megabytes in (8, 64):
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line * (megabytes * 1000)))
        least.append(min(seconds(megabytes) for _ in range(3)))
    assert least[1] < 8 * 4 * least[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_what_cannot_be_opened_is_an_error_of_the_data(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(No such file"):
        texts_of(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(Is a directory"):
        texts_of(tmp_path / name)


# ---------------------------------------------------------------- parquet


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array(["b"])], names=["text", "n", "text"])
    (tmp_path / "t.parquet").write_bytes(parquet(table))
    with pytest.raises(DataError, match=r"t\.parquet: 2 columns 'text'; it has \['text', 'n', 'text'\]\. Name the one"):
        texts_of(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["one", "two", "one"]),
        pa.array(["one", "two", "one"], pa.large_string()),
        pa.array(["one", "two", "one"], pa.string_view()),
        pa.array(["one", "two", "one"]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_strings_in_any_arrow_type(tmp_path: Path, column: pa.Array) -> None:
    nested = pa.array([{"text": 1, "b": [2]}] * 3)
    (tmp_path / "t.parquet").write_bytes(parquet(pa.table({"meta": nested, "text": column, "text.b": nested})))
    assert texts_of(tmp_path / "t.parquet") == ["one", "two", "one"]


def test_a_column_whose_name_has_a_dot_is_no_path(tmp_path: Path) -> None:
    table = pa.table({"a": [{"b": "wrong"}], "a.b": ["right"]})
    (tmp_path / "t.parquet").write_bytes(parquet(table))
    assert texts_of(tmp_path / "t.parquet", "a.b") == ["right"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([b"bytes"]), "binary"),
        (pa.array([None]), "null"),
        (pa.array([["list"]]), "list<"),
        (pa.array([{"inner": "text"}]), "struct<inner: string>"),
        (pa.array([1]), "int64"),
    ],
)
def test_columns_that_hold_no_strings(tmp_path: Path, column: pa.Array, kind: str) -> None:
    (tmp_path / "t.parquet").write_bytes(parquet(pa.table({"text": column})))
    with pytest.raises(DataError, match=rf"t\.parquet: column 'text' must hold strings, it holds {kind}"):
        texts_of(tmp_path / "t.parquet")


def test_a_row_group_is_not_held_whole(tmp_path: Path) -> None:
    texts = [os.urandom(2000).hex() for _ in range(10_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet", row_group_size=10_000, use_dictionary=False)
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() for _ in read_texts(tmp_path / "t.parquet", "text"))
    assert peak - before < 10 << 20 < (tmp_path / "t.parquet").stat().st_size


def test_a_flipped_byte_in_a_parquet_page_with_a_checksum_is_found(tmp_path: Path) -> None:
    text = os.urandom(64).hex()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    content = bytearray(parquet(pa.table({"text": [text]}), **options))
    content[content.index(text.encode()) + 5] ^= 1
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as parquet .*CRC"):
        texts_of(tmp_path / "t.parquet")


# ---------------------------------------------------------------- anything


def damaged(data: bytes, draw: random.Random) -> bytes:
    """`data` with bytes changed, cut out or cut off, as often as not near its end, where parquet has its index."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 20])):
        at = draw.randrange(max(0, len(out) - 400) if draw.random() < 0.5 else 0, len(out) - 1)
        kind = draw.random()
        if kind < 0.8:
            out[at] = draw.randrange(256)
        elif kind < 0.9:
            del out[at + 2 : at + draw.randrange(3, 50)]
        else:
            del out[at + 2 :]
    return bytes(out)


def test_damaged_files_are_read_or_refused_but_raise_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(20261128)
    texts = [f"document {i} é 🙂" for i in range(60)]
    table = pa.table({"n": range(60), "text": texts})
    files = {
        "a.jsonl": lines(*texts),
        "a.jsonl.gz": gzip.compress(lines(*texts)),
        "a.jsonl.zst": zstandard.compress(lines(*texts)),
        "a.parquet": parquet(table, row_group_size=20),
        "plain.parquet": parquet(table, compression="none", use_dictionary=False),
    }
    refused = 0
    for _ in range(100):
        for name, content in files.items():
            (tmp_path / name).write_bytes(damaged(content, draw))
            try:
                texts_of(tmp_path / name)
            except DataError:
                refused += 1
    assert refused > 250
