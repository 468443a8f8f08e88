"""Texts, files and what is stored of them, which the tests of documents share."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_tokenizer import MULTILINGUAL, byte_level_tokenizer

from megatron_sip.data.documents import Corpus

TOKENIZER = byte_level_tokenizer()
TEXTS = [*MULTILINGUAL, "", "line\nbreak \u2028 and <|im_end|> markers", " leading and trailing "]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One object a line."""
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def stored(corpus: Corpus) -> list[list[int]]:
    """The token ids of every document, in order."""
    return [source.tokens(i).tolist() for source in corpus.sources for i in range(len(source))]
