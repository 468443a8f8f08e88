"""Files of results: what is written is read, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.errors import DataError
from megatron_sip.evaluation.results import Result, read_results, write_results


def test_what_is_written_is_read(tmp_path: Path) -> None:
    results = [Result("safety", "toxigen", 0.801, 940, (0.77, 0.83), 2), Result("nll", "suffix", 3.2, 10)]
    write_results(tmp_path / "new" / "safety.json", {"model": "m", "step": "7"}, results)
    found = read_results(tmp_path / "new" / "safety.json")
    assert (found.about, found.results) == ({"model": "m", "step": "7"}, results)


@pytest.mark.parametrize("content", ["{}", "[]", '{"format": "other"}'])
def test_another_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json: no file of results"):
        read_results(tmp_path / "x.json")


def test_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": "megatron-sip results 1", "about": {}, "results": [{"value": 1}]}')
    with pytest.raises(DataError, match=r"x\.json"):
        read_results(tmp_path / "x.json")
