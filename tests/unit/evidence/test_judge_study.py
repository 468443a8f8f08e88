"""evidence/judge.py: its commands are understood, and its report, figure and text are what the judges' files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from evidence_cases import understood

from evidence.judge import DOCUMENTS, LEARNT, MODELS, STUDY, later_leads, parts, trained_judge
from evidence.later_leads import TAKEN, later
from evidence.results import refuse_paths
from evidence.study import ROOT, Place
from megatron_sip.evaluation.win_rate import wilson_interval


@pytest.fixture(name="place")
def place_of(tmp_path: Path) -> Place:
    return Place(tmp_path / "run", smollm2=tmp_path / "model", wiki_leads=tmp_path / "leads.jsonl")


def test_commands_are_understood_by_their_programs(place: Place) -> None:
    programs = understood(parts(place), place.smollm2, place.wiki_leads)
    kinds = len(DOCUMENTS)
    asked = [*["megatron_sip.prepare"] * kinds, *["megatron_sip.judge"] * 2 * kinds]
    assert programs == ["examples/train_judge.sh", "evidence.later_leads", *asked]


def test_judges_are_asked_about_texts_that_were_not_trained_on(place: Place) -> None:
    training, leads, texts, *asked = parts(place)
    assert [part.served for part in asked] == [place.smollm2, trained_judge(place)]
    assert trained_judge(place) / "config.json" in training.results
    assert leads.results == (later_leads(place),)
    for words in texts.commands:
        assert words[words.index("--data-path") + 1] == str(later_leads(place))
    lines = [b"%d\n" % number for number in range(TAKEN + 2)]
    assert later(b"".join(lines)) == b"%d\n%d\n" % (TAKEN, TAKEN + 1)
    [taken] = re.findall(r"--max-documents (\d+)", (ROOT / "examples" / "train_judge.sh").read_text())
    assert int(taken) <= TAKEN


def accuracy(right: float, both: float, each: float, option_1: float) -> dict[str, Any]:
    """As `megatron_sip.judge accuracy` writes it."""
    found = {
        "records": 200,
        "pairs": 100,
        "accuracy": right,
        "accuracy_ci95": [right - 0.05, right + 0.05],
        "by_verdict": {"1": min(1.0, right + 0.1), "2": right - 0.1},
        "both_orders": both,
        "in_each_order": each,
        "first_option": option_1,
    }
    return {"model": "/somewhere/judge", "all": found, "failed": 0, "subsets": {}}


def write_files(place: Place) -> None:
    folder = place.run_dir / STUDY.name
    answers = {name: {kind: accuracy(0.5, 0.55, 0.02, 0.9) for kind in DOCUMENTS} for name in MODELS}
    answers["trained"][LEARNT] = accuracy(0.9, 0.97, 0.8, 0.55)
    answers["trained"]["numbers"] = accuracy(0.3, 0.3, 0.1, 0.5)
    for name, by_kind in answers.items():
        for kind, found in by_kind.items():
            path = folder / kind / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
    curves = {
        "score/rollout": [0.4, 0.9],
        "judge/label/first-shown-preferred/short-quality": [0.8, 0.5],
        "loss": [0, 0],
    }
    training = {"steps": 2, "step_seconds": {"total": 30.0}, "curves": curves, "settings": {"--save": "/somewhere"}}
    (folder / "training").mkdir()
    (folder / "training" / "judge_training.json").write_text(json.dumps(training))


def test_report_text_and_figure_are_what_the_files_say(place: Place, tmp_path: Path) -> None:
    write_files(place)
    report = json.loads(json.dumps(STUDY.report(place)))
    refuse_paths(report, ("/somewhere",))
    learnt = report["kinds"][LEARNT]["trained"]
    assert learnt["right"] == {"value": 0.9, "low": 0.85, "high": 0.95}
    assert [learnt["mean_of_orders"][end] for end in ("low", "high")] == pytest.approx(
        wilson_interval(0.97, 100), abs=1e-5
    )
    assert report["training"]["curves"] == {"right": [0.4, 0.9], "option 1": [0.8, 0.5]}
    text = STUDY.section(report)
    assert (
        "| shuffle | trained | 100 | 90 (85 to 95) | 100 (96 to 100) | 80 (71 to 87) | 55 (45 to 64) | 97 (92 to 99) |"
        in text
    )
    flat = " ".join(text.split())
    assert (
        "The untrained judge, by the mean of both orders, is not distinguishable from chance in shuffle, repeat,"
        in flat
    )
    assert "The trained judge, by the mean of both orders, is above chance in shuffle; not" in flat
    assert "; below chance in numbers." in flat
    STUDY.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
