"""evidence/from_scratch.py: its model loads, its commands are understood, and its report and page are what the runs logged."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from evidence_cases import understood
from transformers import AutoModelForCausalLM, AutoTokenizer

from evidence.from_scratch import (
    CHANCE,
    CHOSEN,
    GROUPS,
    NLL,
    RF_NLL,
    SCORES,
    SFT,
    STUDY,
    Sizes,
    continued,
    parts,
    pretrained,
    told,
)
from evidence.scratch_model import END, SHAPE, write
from evidence.study import ROOT, Place
from megatron_sip.config.presets import expand_presets

TEXTS = ["A short lead of an article.", "Another one, about the first.", "Größe und Maß"] * 5


@pytest.fixture(name="place")
def place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(ROOT)  # which presets' paths start from
    (tmp_path / "leads.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write(TEXTS, tmp_path / "model", vocabulary=300)
    return Place(tmp_path / "run", smollm2=tmp_path / "model", wiki_leads=tmp_path / "leads.jsonl")


def test_the_random_model_is_llama_s_shape_and_reads_every_text(place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place.smollm2)
    model = AutoModelForCausalLM.from_pretrained(place.smollm2)
    assert (model.config.model_type, model.config.hidden_size) == ("llama", SHAPE["hidden_size"])
    assert 5e6 < sum(one.numel() for one in model.parameters()) < 20e6
    assert model.config.vocab_size == len(tokenizer)
    assert (tokenizer.eos_token, tokenizer.decode(tokenizer(TEXTS[2]).input_ids)) == (END, TEXTS[2])


def test_commands_are_understood_by_their_programs(place: Place) -> None:
    made = parts(place)
    programs = understood(made, place.smollm2, place.wiki_leads)
    assert programs == ["evidence.scratch_model", *(["megatron_sip"] * (len(made) - 1))]


def test_each_run_starts_from_a_model_that_an_earlier_part_leaves(place: Place) -> None:
    left: set[Path] = set()
    for part in parts(place):
        words = part.commands[0]
        if words[2] == "megatron_sip":
            assert Path(words[3]) / "config.json" in left
        left |= set(part.results)


def test_what_is_measured_on_is_held_out_from_the_beginning() -> None:
    flags = [
        expand_presets(["--preset", f"{ROOT}/evidence/{name}.args"]) for name in ("from_scratch", "from_scratch_plain")
    ]
    splits = [given[given.index("--split") + 1] for given in flags]
    assert splits[0] == splits[1]
    assert int(splits[0].split(",")[2]) > 0


def write_run(run_dir: Path, chosen: Sequence[float], nats: Sequence[float]) -> None:
    steps: list[dict[str, Any]] = [{"step": 0, NLL: nats[0]}]
    judged = {CHANCE: 0.5, GROUPS: 16.0, SCORES["suffix"]: -3.0}
    steps += [{"step": i, CHOSEN: one, SCORES["rollout"]: one - 9, **judged} for i, one in enumerate(chosen, start=1)]
    steps.append({"step": 20, NLL: nats[1]})
    run_dir.mkdir(parents=True)
    texts = ["a b c d e f"] * 2 + ["the " * 8] * 2  # the later half loops
    lines = [{"candidates": [{"kind": kind, "text": text} for kind in ("suffix", "rollout")]} for text in texts]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_report_page_and_figure_are_of_what_the_runs_logged(place: Place, tmp_path: Path) -> None:
    stages = Sizes().plain
    for number, steps in enumerate(stages):
        write_run(continued(place, RF_NLL, steps), [number / 10, number / 5], [8.0 - number, 7.5 - number])
        write_run(continued(place, RF_NLL, steps, 0.3), [0.9, 0.7], [8.0, 9.0])
    write_run(continued(place, SFT, stages[-1]), [], [6.0, 5.25])
    report = STUDY.report(place)
    assert [one["chosen"] for one in report[RF_NLL]] == [0.0, 0.15, 0.3, *[0.8] * 3]
    assert [one["temperature"] for one in report[RF_NLL]] == [*[1.0] * 3, *[0.3] * 3]
    assert [one["groups"] for one in report[RF_NLL]] == [32] * 6
    assert report[SFT] == {"plain_steps": stages[-1], "nll": [[0, 6.0], [20, 5.25]]}
    text = STUDY.section(json.loads(json.dumps(report))).replace("\n", " ")
    assert (
        "At temperature 0.3: no stage's share differs from the one's before it beyond both intervals. Rollouts are"
        in text
    )
    assert "RF-NLL at 5.500, with surer rollouts at 9.000; one run" in text
    assert f"| {stages[-1]} | 1 | 6.000 | 5.500 after 20 | 30.0% (" in text
    assert "| 40.0% (20.3 to 63.6) | 32 | -8.70 | -3.00 | 80 |" in text
    assert "ends at 5.250 nats" in text
    STUDY.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("intervals", "late", "said"),
    [
        ([(0.0, 0.1), (0.05, 0.2)], 0.1, "no stage's share differs from the one's before it"),
        ([(0.0, 0.1), (0.2, 0.3)], 0.5, "higher after 1 plain steps .* At none of these stages are rollouts preferred"),
        ([(0.2, 0.3), (0.0, 0.1)], 0.5, "lower after 1 plain steps .* At none of these stages are rollouts preferred"),
        ([(0.0, 0.1), (0.6, 0.7)], 0.1, "Rollouts are preferred to the text, beyond chance, after 1 plain steps.$"),
        (
            [(0.3, 0.5), (0.3, 0.5)],
            0.9,
            "later half of these steps .* after 0 and 1 plain steps: by then 70 and 70% of",
        ),
    ],
)
def test_what_is_told_needs_intervals(intervals: list[tuple[float, float]], late: float, said: str) -> None:
    course = {"chance": 0.5, "chosen_by_step": [0.0, 0.0, late, late, 1.0], "groups": 400, "repetition": 0.7}
    stages = [{"plain_steps": i, "chosen_interval": span, **course} for i, span in enumerate(intervals)]
    assert re.search(said, told(stages, 4))


def test_the_plain_model_of_a_stage_is_what_its_run_exports(place: Place) -> None:
    assert pretrained(place, 0) / "hf" / "config.json" in parts(place)[0].results
