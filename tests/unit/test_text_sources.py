"""Texts that no tokenizer takes are refused with file and place, as other broken lines are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sip.data.errors import DataError
from megatron_sip.data.text_sources import read_texts


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
