"""docs/results.md is what the studies' JSON files give; the driver publishes reports, and no path of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evidence import __main__ as driver
from evidence.results import figure_of, page, provenance, publish, refuse_paths, write_page
from evidence.study import PYTHON, ROOT, Part, Place, Study, StudyError, Work
from evidence.study import commit as study_commit

RESULTS = ROOT / "docs" / "results"


def test_the_page_in_the_docs_is_that_of_the_json_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page(driver.STUDIES.values(), RESULTS)
    for path in RESULTS.glob("evidence_*.json"):
        assert path.stem.removeprefix("evidence_") in driver.STUDIES
        assert path.with_suffix(".png").is_file()
        report = json.loads(path.read_text())
        assert {"question", "machine", "commits", "versions", "seeds", "seconds", "report"} <= report.keys()
        refuse_paths(report, ("/home/", "/root/", "/tmp/", "/work/"))


def made_up(tmp_path: Path, name: str = "small") -> Study:
    """A study whose report is a number that its part writes."""
    file = tmp_path / "number.json"

    def parts(place: Place) -> list[Part]:
        code = f"import pathlib; pathlib.Path({str(file)!r}).write_text('{len(place.seeds)}')"
        return [Part("count", ((PYTHON, "-c", code),), (file,))]

    def report(place: Place) -> dict[str, Any]:
        return {"number": int(file.read_text()), "quick": place.quick}

    def draw(found: Mapping[str, Any], png: Path) -> None:
        png.write_bytes(str(found["number"]).encode())

    def section(found: Mapping[str, Any]) -> str:
        return f"The number is {found['number']}."

    return Study(name, "How many seeds?", 1, parts, report, draw, section)


@pytest.fixture(name="only")
def only_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The driver with a made-up study and one that needs it, and tools that fetch nothing."""
    study = made_up(tmp_path)
    needing = replace(study, name="needing", question="Does it need it?", needs={"small": ("count",)})
    monkeypatch.setattr(driver, "STUDIES", {study.name: study, needing.name: needing})
    monkeypatch.setattr(driver, "fetched", lambda tool: tmp_path / tool)
    monkeypatch.chdir(ROOT)
    return study


def test_a_study_is_run_published_and_stands_on_the_page(only: Study, tmp_path: Path) -> None:
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    words = ["--results", str(results), "--run-dir", str(tmp_path / "run"), "--seeds", "3", "4"]
    driver.main([*words, "--only", only.name])
    report = json.loads((results / "evidence_small.json").read_text())
    assert report["report"] == {"number": 2, "quick": False}
    assert next(iter(report)) == "question"  # not by name: the page's rows are in this order
    assert (report["seeds"], report["question"]) == ([3, 4], "How many seeds?")
    assert [len(commit.removesuffix(" changed")) for commit in report["commits"]] == [40]
    assert {"torch", "sglang", "megatron-core"} <= report["versions"].keys()
    written = results.with_suffix(".md").read_text()
    assert "## How many seeds?\n\n![small](results/evidence_small.png)\n\nThe number is 2.\n" in written
    assert "## Not run yet\n\n- **needing**: Does it need it?\n" in written
    assert figure_of("small", results).read_bytes() == b"2"

    report["report"]["number"] = 7  # by hand: the page follows the JSON, with --page alone
    (results / "evidence_small.json").write_text(json.dumps(report))
    driver.main(["--page", "--results", str(results)])
    assert "The number is 7." in results.with_suffix(".md").read_text()
    assert figure_of("small", results).read_bytes() == b"7"


def test_what_a_study_needs_is_done_before_it(only: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver.main(["--dry-run", "--only", "needing", "--run-dir", str(tmp_path / "run")])
    told = capsys.readouterr().out
    assert told.index("# small, part 1 of 1: count") < told.index("# needing:")
    assert not (tmp_path / "number.json").exists()
    results = tmp_path / "results"
    driver.main(["--only", "needing", "--run-dir", str(tmp_path / "run"), "--results", str(results)])
    assert [path.name for path in results.glob("*.json")] == [
        "evidence_needing.json"
    ]  # what is only needed is no study run


def test_of_a_needed_study_the_needed_parts_are_done() -> None:
    """Those that other studies name are there, and are all of it only where the study itself is asked for."""
    place = Place(Path("run"))
    for study in driver.STUDIES.values():
        for name, parts in study.needs.items():
            assert set(parts) <= {part.name for part in driver.STUDIES[name].parts(place)}
    [(first, parts), (second, all_of_it)] = driver.chosen(["objectives"])
    assert (first.name, parts, second.name, all_of_it) == ("judge", {"training", "leads"}, "objectives", None)
    assert [(study.name, parts) for study, parts in driver.chosen(["cost", "judge"])] == [
        ("judge", None),
        ("cost", None),
    ]


def test_a_quick_run_publishes_nothing(only: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver.main(
        ["--quick", "--only", only.name, "--run-dir", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    )
    assert "The number is 2." in capsys.readouterr().out
    assert (tmp_path / "run-quick" / "small" / "parts.json").is_file()
    assert not (tmp_path / "results").exists()


def test_the_commit_that_reports_and_all_processors_are_named(tmp_path: Path) -> None:
    study = made_up(tmp_path)
    work = Work({"a": 1.2, "b": 2.4}, ("a" * 40,), ("one", "another"))
    publish(study, {"number": 1}, Place(tmp_path / "run"), work, tmp_path)
    found = json.loads((tmp_path / f"evidence_{study.name}.json").read_text())
    assert [commit[:40] for commit in found["commits"]] == ["a" * 40, study_commit()[:40]]
    assert f"commit aaaaaaaaaaaa, {study_commit()[:12]}" in provenance(study, found)
    assert "cores of one and of another. Again" in provenance(study, found)
    assert (found["seconds"], found["part_seconds"]) == (4, {"a": 1, "b": 2})


def test_a_report_with_a_path_of_this_machine_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path / "run")
    with pytest.raises(StudyError, match="no path of this machine"):
        publish(made_up(tmp_path), {"judge": [{"model": f"{place.run_dir}/judge"}]}, place, Work({}, (), ()), tmp_path)
    assert not list(tmp_path.glob("evidence_*"))


def test_a_mistake_is_a_line(only: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.main(["--only", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_a_page_without_results_names_all_studies(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    write_page(driver.STUDIES.values(), tmp_path / "results")
    written = (tmp_path / "results.md").read_text()
    assert all(f"- **{study.name}**: {study.question}" in written for study in driver.STUDIES.values())
