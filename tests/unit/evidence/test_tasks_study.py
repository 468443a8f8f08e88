"""evidence/tasks.py: its commands are understood; the same questions are compared, and the text is what the answers say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from evidence_cases import small_place, understood

from evidence.objectives import BASELINE, MAIN
from evidence.results import refuse_paths
from evidence.study import Place
from evidence.tasks import ALL, INITIAL, STUDY, TRAINED, changes, parts


@pytest.fixture(name="place")
def place_of(tmp_path: Path) -> Place:
    return small_place(tmp_path, (3, 4))


@pytest.mark.parametrize("quick", [False, True])
def test_commands_are_understood_by_their_programs(place: Place, quick: bool) -> None:
    made = parts(replace(place, quick=quick))
    programs = understood(made, place.smollm2, place.wiki_leads)
    asked = ["megatron_sip.evaluate"]
    trained = ["megatron_sip", *asked]
    assert programs == ["tools/fetch_eval_sets.py", "evidence.later_leads", *asked, *trained * len(TRAINED)]
    for training, asking in zip(made[2::2], made[3::2], strict=True):
        words = asking.commands[0]
        assert training.results == (Path(words[words.index("--model") + 1]) / "config.json",)
        assert training.commands[0][training.commands[0].index("--seed") + 1] == "3"


def write_answers(place: Place, name: str, right: Sequence[int]) -> None:
    """Answers to as many questions of piqa, and to two of a group's tasks, of which one is right."""
    lines = [
        {"dataset": "piqa", "task": "piqa", "question": i, "prompt_hash": "p", "acc": one}
        for i, one in enumerate(right)
    ]
    lines += [{"dataset": "mmlu", "task": f"mmlu_{i}", "question": 0, "prompt_hash": "m", "acc": i} for i in range(2)]
    file = place.run_dir / "tasks" / name / "tasks.json.questions.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_text_and_figure_are_what_the_answers_say(place: Place, tmp_path: Path) -> None:
    for name in (INITIAL, *TRAINED):
        write_answers(place, name, (1,) * 40 if name == MAIN else (1, 0) * 20)
    report = json.loads(json.dumps(STUDY.report(place)))
    refuse_paths(report, (str(tmp_path),))
    assert report["seeds"] == [3]
    assert report["questions"] == {"piqa": 40, "mmlu": 2}
    assert [report["right"][name]["piqa"]["value"] for name in (INITIAL, BASELINE, MAIN)] == [0.5, 0.5, 1.0]
    assert (report["changes"][BASELINE][ALL]["value"], report["changes"][BASELINE][ALL]["gained"]) == (0.0, 0)
    change = report["changes"][MAIN]
    assert (change["piqa"]["value"], change[ALL]["value"]) == (0.5, round(20 / 42, 5))
    assert (change["piqa"]["gained"], change["piqa"]["lost"]) == (20, 0)
    assert 0.3 < change["piqa"]["low"] < 0.5 < change["piqa"]["high"] < 0.7
    assert report["main_less_baseline"] == change
    text = STUDY.section(report)
    assert "|  | piqa | mmlu | all questions |" in text
    assert "| questions | 40 | 2 | 42 |" in text
    assert "| initial | 50 (35 to 65) | 50 (" in text
    assert "| DPO, suffix + 4 rollouts | +50.0 (+" in text
    assert "| GRPO, 4 rollouts | +0.0 (-" in text
    told = " ".join(text.split())
    assert "next token, suffixes: no difference that the interval shows; next token, whole pieces: no" in told
    assert "DPO, suffix + 4 rollouts: better; GRPO" in told
    assert "DPO against next tokens of suffixes: better." in told
    STUDY.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("other", [("piqa", 2, "p"), ("piqa", 1, "q")])
def test_answers_to_other_questions_or_asked_otherwise_are_not_compared(other: tuple[str, int, str]) -> None:
    before = {"piqa": {("piqa", 0, "p"): True, ("piqa", 1, "p"): False}}
    with pytest.raises(AssertionError, match="other questions"):
        changes({"piqa": {("piqa", 0, "p"): True, other: False}}, before)
