"""Documents, a tokenizer's folder and command lines that the tests of `prepare` share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_judge import FakeJudge
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.prepare.__main__ import COMMANDS, command_line

SENTENCES = [
    "The bridge at Norwick was built in 1887 by Carl Lind.",
    "It is 412 metres long and carries two lanes.",
    "Queen Ada opened it on a cold morning in May.",
    "Nobody from Bellham came, since the road was flooded.",
    "Later 30 engineers measured it again.",
]


def prose(number: int, sentences: int = 6) -> str:
    """A document of its own for each number."""
    return f"Report {number}. " + " ".join(SENTENCES[(number + i) % len(SENTENCES)] for i in range(sentences))


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_documents(path: Path, count: int) -> Path:
    return write_records(path, [{"text": prose(i)} for i in range(count)])


def tokenizer_folder(folder: Path) -> Path:
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def run(*words: str | Path) -> dict[str, Any]:
    """The manifest of a command line."""
    given = command_line().parse_args([str(word) for word in words])
    return dict(COMMANDS[given.command].run(given))


async def ask(judge: FakeJudge, *words: str | Path) -> dict[str, Any]:
    """The manifest of a command line that asks `judge`, which answers on this thread meanwhile."""
    client = ("--teacher-url", judge.url, "--teacher-api", "openai", "--judge-deadline", "20")
    return await asyncio.to_thread(run, *words, *client)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file that a command leaves, hidden ones aside."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
