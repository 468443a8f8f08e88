"""What benchmarks and studies publish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PUBLISHED = sorted(
    path for folder in ("benchmarks/results", "docs/results") for path in (REPO / folder).rglob("*.json")
)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_results_are_json_to_every_reader(path: Path) -> None:
    """JSON has no word for what is not a number."""

    def refuse(word: str) -> None:
        raise ValueError(f"{path} holds {word}")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
