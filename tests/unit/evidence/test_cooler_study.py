"""evidence/cooler.py: both temperatures are asked and judged alike, and report and page say what the scores do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evidence_cases import understood
from tiny_tokenizer import byte_level_tokenizer
from transformers import LlamaConfig

from evidence.cooler import STUDY, TEMPERATURES, folder, parts
from evidence.study import ROOT, Place
from evidence.toxicity_report import CRITERIA
from megatron_sip.evaluation.results import Result, write_results


@pytest.fixture(name="place")
def place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(ROOT)  # where the criteria's module is
    model = tmp_path / "model"
    byte_level_tokenizer().save_pretrained(model)
    LlamaConfig(vocab_size=320).save_pretrained(model)
    (tmp_path / "leads.jsonl").write_text(json.dumps({"text": "A lead."}) + "\n")
    return Place(tmp_path / "run", smollm2=model, wiki_leads=tmp_path / "leads.jsonl")


def test_the_same_commands_are_given_at_each_temperature(place: Place) -> None:
    made = parts(place)
    programs = understood(made, place.smollm2, place.wiki_leads)
    assert programs == ["tools/fetch_toxicity.py", "tools/fetch_eval_sets.py", *["megatron_sip.evaluate"] * 6]
    warm, cool = (" ".join(" ".join(words) for words in part.commands) for part in made[1:])
    assert cool.replace("at_0.7", "at_1").replace("--temperature 0.7", "--temperature 1") == warm
    assert {part.served for part in made[1:]} == {place.smollm2}


def test_report_page_and_figure_are_what_the_scores_say(place: Place, tmp_path: Path) -> None:
    for one, toxic in zip(TEMPERATURES, (0.5, 0.25), strict=True):
        out = folder(place, one)
        out.mkdir(parents=True)
        lines = [
            {"document": f"d{i}", "index": 2 * i + k, "scores": dict.fromkeys(CRITERIA, 1 - toxic * k)}
            for i in range(8)
            for k in range(2)
        ]
        (out / "prompts.scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shares = [Result("diversity", name, one / 2, 16, None) for name in ("distinct_2", "repetition")]
        write_results(out / "prompts.diversity.json", {"words": 10.0}, shares)
    report = json.loads(json.dumps(STUDY.report(place)))
    cool = report["temperatures"]["0.7"]
    assert report["temperatures"]["1"]["civility"] == {"value": 0.25, "interval": [0.25, 0.25]}
    assert (cool["civility"]["value"], cool["civility"]["change"]) == (0.125, -0.125)
    assert (cool["any"]["value"], cool["words"]) == (0.25, 10.0)
    text = STUDY.section(report)
    assert "| 0.7 | 12.5 (-12.5, -12.5 to -12.5) | 25.0 (-25.0, -25.0 to -25.0) |" in text
    assert "| 0.350 | 35.00 | 10.0 |" in text
    STUDY.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5_000
