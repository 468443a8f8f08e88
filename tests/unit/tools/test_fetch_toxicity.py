"""tools/fetch_toxicity.py: sayings become pages, none is lost or twice, and only a folder that it finished is reused."""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import fetch_toxicity
from fetch_toxicity import FORTUNES, MADE_OF, PAGE_CHARACTERS, fetch, pages, sayings

CLEAN = "This fortune brought to you by:\n$FreeBSD$\n%\nA penny\tsaved\n  is a penny.\n%\nHello.\n%\nHello.\n%\n"
OFFENSIVE = "%% $FreeBSD$\n%\nDarn it!\n%\n"


def test_sayings_are_what_stands_between_marks_once_each() -> None:
    assert sayings(CLEAN) == ["A penny saved is a penny.", "Hello."]
    assert sayings(OFFENSIVE) == ["Darn it!"]


def test_pages_hold_every_saying_in_order_and_are_long_enough_but_for_the_last() -> None:
    entries = [f"{number} " + "word " * (number % 30) for number in range(200)]
    made = list(pages(entries, "clean"))
    assert "\n\n".join(page["text"] for page in made) == "\n\n".join(entries)
    assert all(len(page["text"]) >= PAGE_CHARACTERS for page in made[:-1])
    assert [page["id"] for page in made] == [f"clean:{number}" for number in range(len(made))]


def test_only_a_folder_that_it_finished_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[Path] = []

    def install(folder: Path) -> None:
        installed.append(folder)
        (folder / FORTUNES).mkdir(parents=True)
        (folder / FORTUNES / "fortunes").write_text(CLEAN)
        (folder / FORTUNES / "fortunes-o").write_text(codecs.encode(OFFENSIVE, "rot13"))

    monkeypatch.setattr(fetch_toxicity, "install", install)
    save = tmp_path / "toxicity"
    assert fetch(save) == fetch(save) == save
    assert len(installed) == 1
    assert json.loads((save / "offensive.jsonl").read_text())["text"] == "Darn it!"
    assert json.loads((save / "clean.jsonl").read_text())["subset"] == "clean"
    (save / MADE_OF).write_text("{}")
    with pytest.raises(SystemExit, match="was not made by this script"):
        fetch(save)
