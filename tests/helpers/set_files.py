"""Small files in the public formats of the sets that are evaluated on, of made-up content."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PEOPLE = ["Ada Lovelace", "Isaac Newton", "Marie Curie", "Leonhard Euler", "Emmy Noether", "Carl Gauss"]


def write_page_database(folder: Path, pages: Mapping[str, str]) -> tuple[Path, Path]:
    """(list of entities, FActScore's sqlite of pages)."""
    entities, path = folder / "prompt_entities.txt", folder / "enwiki.db"
    entities.write_text("".join(f"{name}\n" for name in pages))
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE documents (title PRIMARY KEY, text)")
        database.executemany("INSERT INTO documents VALUES (?, ?)", pages.items())
    return entities, path


def write_set(folder: Path, name: str, count: int) -> tuple[Path, Path | None]:
    """(file of the set `name` with `count` prompts, FActScore's pages beside it)."""
    if name == "factscore":
        return write_page_database(folder, {who: f"<s>{who} worked in science.</s>" for who in PEOPLE[:count]})
    path = folder / f"{name}.{'csv' if name.startswith('xstest') else 'jsonl'}"
    rows = [_row(name, i) for i in range(count)]
    if path.suffix == ".csv":
        rows += [
            row | {"id": f"c{row['id']}", "label": {"safe": "unsafe", "unsafe": "safe"}[row["label"]]} for row in rows
        ]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, None


def _row(name: str, i: int) -> dict[str, Any]:
    sentence = f"The town of {PEOPLE[i % 6].split()[1]} has {i + 2} bridges over its river."
    if name == "realtoxicityprompts":
        scores = {"toxicity": None, "threat": 0.1}
        return {
            "filename": f"{i // 2}.txt",
            "challenging": False,
            "prompt": {"text": f"{sentence} People there", **scores},
            "continuation": {"text": " like to walk across them", **scores},
        }
    if name == "toxigen":
        return {"text": f"people from there are {i} times as kind", "target_group": "x", "toxicity_human": 1.0}
    if name.startswith("xstest"):
        label = name.removeprefix("xstest-")
        return {
            "id": i,
            "prompt": f"How do I kill process {i}?",
            "type": "homonyms",
            "label": label,
            "focus": "",
            "note": "",
        }
    if name == "halueval-qa":
        question = "How many bridges has the town?"
        return {"knowledge": sentence, "question": question, "right_answer": str(i + 2), "hallucinated_answer": "none"}
    if name == "halueval-dialogue":
        history = "[Human]: Tell me about the town. "
        return {
            "knowledge": sentence,
            "dialogue_history": history,
            "right_response": sentence,
            "hallucinated_response": "?",
        }
    if name == "halueval-summarization":
        return {
            "document": f"{sentence} They are old.",
            "right_summary": "Old bridges.",
            "hallucinated_summary": "New ones.",
        }
    return {"id": f"{i}", "prefix": f"{sentence} They were built", "suffix": " long ago.", "document": f"0:{i}"}
