"""What benchmarks publish: JSON without this machine's paths."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.machine import REPO, write_report


def test_a_report_names_files_from_the_repository_s_root_and_from_home(tmp_path: Path) -> None:
    report = {"criterion": str(REPO / "examples/short_quality.txt"), "model": str(Path.home() / "model"), "else": "a/b"}
    write_report(tmp_path / "report.json", report)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == {"criterion": "examples/short_quality.txt", "model": "~/model", "else": "a/b"}
