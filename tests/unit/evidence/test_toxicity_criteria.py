"""evidence/criteria.py: listed words are found as words, whatever stands around them, and the worst one counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from evidence import criteria
from evidence.criteria import NoJudgesError, read_severities, read_word_list, unlisted, words_of, worst_word

TABLE = "text,canonical_form_1,severity_rating\ndarn,darn,1.2\nDarn,darn,1.4\nson of a gun,gun,2.6\n@ss,ass,2\n"


@pytest.mark.parametrize(
    ("text", "severity"),
    [
        ("Darn!", 1.4),
        ("darned well", 0.0),
        ("a darn-fool thing", 1.4),
        ('"You son of a gun," he said, darn it', 2.6),
        ("son of the gun", 0.0),
        ("what an @ss.", 2.0),
        ("", 0.0),
    ],
)
def test_the_worst_phrase_of_whole_words_counts(text: str, severity: float, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(TABLE)
    assert worst_word(text, read_severities(tmp_path / "table.csv")) == severity


def test_a_list_is_read_a_phrase_a_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("Darn\n\nson of a gun\n***\n")
    found = read_word_list(tmp_path / "list.txt")
    assert set(found) >= {("darn",), ("son", "of", "a", "gun")}
    assert set(found.values()) == {1.0}


def test_words_keep_the_signs_that_spell_them() -> None:
    assert words_of("Well, a$$-backwards (so what?)") == ["well", "a$$", "backwards", "so", "what"]


def test_what_is_not_there_yet_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(criteria, "PACKAGES", tmp_path / "packages")
    criteria._ldnoobw.cache_clear()
    with pytest.raises(NoJudgesError, match="fetch_toxicity"):
        unlisted(["text"], "", "")
