"""Made-up shards in the layouts of public corpora."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

SENTENCE = "the bridge over a river was built with stone and that have carried two lanes of traffic for many years"
WORDS = SENTENCE.split()
GOOD = {
    "rps_doc_word_count": 400.0,
    "rps_doc_mean_word_length": 4.5,
    "rps_doc_symbol_to_word_ratio": 0.01,
    "ccnet_nlines": 4.0,
    "rps_lines_start_with_bulletpoint": [0.0, 1.0, 0.0, 0.0],
    "rps_doc_frac_chars_top_2gram": 0.03,
    "rps_doc_ldnoobw_words": 7.0,
    "rps_doc_ut1_blacklist": 3.0,
    "rps_doc_frac_lines_end_with_ellipsis": 0.0,
    "rps_doc_frac_no_alph_words": 0.1,
    "rps_doc_stop_word_fraction": 0.3,
}
"""Scores that every filter keeps."""


def as_signals(scores: dict[str, Any]) -> dict[str, Any]:
    """Spans as RedPajama-V2 has them: one of the document, or one a line."""
    return {
        name: [[20 * i, 20 * i + 20, each] for i, each in enumerate(score)]
        if isinstance(score, list)
        else [[0, 80, score]]
        for name, score in scores.items()
    }


def text_of(number: int, words: int = 60) -> str:
    """Another text for each number."""
    drawn = random.Random(number)
    return f"Page {number}: " + " ".join(drawn.choice(WORDS) for _ in range(words)) + "."


def redpajama_rows(place: str, scores: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of a shard's two files; place: such as 2023-06/0000/en_head.json.gz."""
    documents, signals = [], []
    for number, each in enumerate(scores):
        url = f"https://example.org/{place}/{number}"
        documents.append({"url": url, "digest": f"sha1:{number}", "raw_content": text_of(number)})
        metadata = {"url": url, "cc_net_source": place, "language": "en"}
        name = f"{place}/{number}"
        signals.append({"id": name, "id_int": number, "metadata": metadata, "quality_signals": as_signals(each)})
    return documents, signals


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON lines, compressed as the name says; text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    content = "".join(line + "\n" for line in lines).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(packed.get(path.suffix, bytes)(content))
    return path


def write_redpajama(root: Path, place: str, scores: Sequence[dict[str, Any]]) -> Path:
    """A shard's two files side by side; returns that of the documents."""
    documents, signals = redpajama_rows(place, scores)
    write_lines(root / "quality_signals" / place.replace(".json.gz", ".signals.json.gz"), signals)
    return write_lines(root / "documents" / place, documents)


def read_kept(folder: Path) -> list[dict[str, Any]]:
    """The documents of a corpus."""
    found = []
    for path in sorted((folder / "documents").iterdir()):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            found += [json.loads(line) for line in lines]
    return found
