"""tests/README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_that_the_readme_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (TESTS / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 80
    for file, test in named:
        text = (TESTS / file).read_text(encoding="utf-8") if (TESTS / file).is_file() else ""
        assert re.search(rf"^(async )?def {test}\(" if test else ".", text, re.MULTILINE), f"{file}::{test}"
