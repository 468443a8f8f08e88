"""tools/rewrite_corpus.py: what it rewrote, a later run with the same settings finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from fake_judge import FakeJudge
from tiny_tokenizer import byte_level_tokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from rewrite_corpus import main, parse_arguments, rewrite_corpus


def flags(folder: Path, url: str) -> list[str]:
    byte_level_tokenizer().save_pretrained(folder / "tokenizer")
    lines = [json.dumps({"text": f"Document {i}. " + f"It has some words, {i} of them. " * 20}) for i in range(8)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    values = {
        "--data-path": folder / "text.jsonl", "--tokenizer": folder / "tokenizer", "--seq-length": 96, "--split": "1",
        "--suffix-length": 16, "--samples": 12, "--batch": 5, "--teacher-url": url, "--teacher-api": "openai",
        "--cache": folder / "rewrites",
    }  # fmt: skip
    return [str(part) for pair in values.items() for part in pair]


async def test_a_second_run_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with FakeJudge(answer=lambda prompt: "whatever this is") as server:
        arguments = parse_arguments(flags(tmp_path, server.url))
        first = await rewrite_corpus(arguments)
        asked = server.requests
        again = await rewrite_corpus(arguments)
        assert first["calls"] == again["calls"] == 12
        assert 0 < asked <= 12
        assert server.requests == asked
        assert again["cached-share"] == 1.0
        assert first["dropped/wrong-start"] == 12


def test_a_missing_corpus_ends_with_a_message(tmp_path: Path) -> None:
    arguments = flags(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "text.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"error: .*text\.jsonl"):
        main(arguments)
