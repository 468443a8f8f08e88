"""evidence/objectives.py: its commands are understood; report, claims, reward hacking and text are what its files say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from evidence_cases import understood
from tiny_tokenizer import byte_level_tokenizer
from transformers import LlamaConfig

from evidence.objectives import BASELINE, MAIN, ROWS, WHOLE, Run, initial, parts, runs
from evidence.objectives_report import STUDY, claims, claims_told, hacked, late_less_early, nll_change
from evidence.results import refuse_paths
from evidence.study import Place
from megatron_sip.evaluation.generation import FORMAT, Generation
from megatron_sip.evaluation.results import Result, write_results


@pytest.fixture(name="place")
def place_of(tmp_path: Path) -> Place:
    model = tmp_path / "model"
    byte_level_tokenizer().save_pretrained(model)
    LlamaConfig(vocab_size=320).save_pretrained(model)
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "leads.jsonl").write_text(json.dumps({"text": "A lead."}) + "\n")
    judge = tmp_path / "run" / "judge" / "training" / "judge"
    judge.mkdir(parents=True)
    LlamaConfig(vocab_size=320).save_pretrained(judge)
    return Place(tmp_path / "run", seeds=(1, 2, 3), smollm2=model, wiki_leads=tmp_path / "leads.jsonl")


@pytest.mark.parametrize("quick", [False, True])
def test_commands_are_understood_by_their_programs(place: Place, quick: bool) -> None:
    place = replace(place, quick=quick)
    programs = understood(parts(place), place.smollm2, place.wiki_leads)
    models = len(runs(place))
    assert programs.count("megatron_sip") == models
    assert programs.count("megatron_sip.evaluate") == 3 * (models + 1) + 3 * models


def test_main_rows_have_every_seed_and_each_is_measured_as_it_was_left(place: Place) -> None:
    assert [run for run in runs(place) if run.row == MAIN] == [Run(MAIN, seed) for seed in (1, 2, 3)]
    assert len(runs(place)) == len(ROWS) + 2 * sum(row.main for row in ROWS.values())
    made = parts(place)
    assert made[0].served == place.smollm2
    for training, measuring in zip(made[1:-2:2], made[2:-2:2], strict=True):
        assert measuring.served is not None
        assert measuring.served / "config.json" in training.results
    for part in made:
        for words in part.commands:
            if "compare" in words:
                before, after = (Path(word) for word in words[4:6])
                assert before.parent == initial(place).folder(place) != after.parent
                assert {before, after} <= {path for other in made for path in other.results}


def write_model(folder: Path, nats: float, text: str, documents: int = 30) -> None:
    folder.mkdir(parents=True)
    write_results(folder / "nll.json", {}, [Result("nll", "suffix", nats, documents, (nats - 0.1, nats + 0.1))])
    lines: list[dict[str, Any]] = [{"format": "header"}]
    lines += [{"index": i, "document": f"0:{i}", "tokens": 10, "nll": 10 * nats + i} for i in range(documents)]
    (folder / "nll.json.suffix.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("sampled", "greedy"):
        made = [Generation(i, str(i), "A prefix", " and on", text, [1], "length") for i in range(2)]
        lines = [{"format": FORMAT}, *map(asdict, made)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(place: Place, run: Run, wins: Sequence[float], nats: float) -> None:
    folder = run.folder(place)
    write_model(folder, nats, "one two three four five")
    for file, win in zip(("likelihood", "judge", "judge_greedy"), wins, strict=True):
        write_results(folder / f"{file}.json", {}, [Result("q", "standard", win, 96, (win - 0.08, win + 0.08))])
    own = {BASELINE: {"target_tokens": 853.0}, WHOLE: {"target_tokens": 840.0}}
    chosen = own.get(run.row, {"chosen_rate/rollout": 0.5, "chosen_chance/rollout": 0.8})
    steps = [{"step": i, "loss": 0.7, "seconds/total": 3.0, **chosen} for i in (1, 2, 3)]
    if run.row not in own:
        steps[-1]["chosen_rate/rollout"] = 0.9 + run.seed / 100
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    control = {"temperature": 0.7, "win_rate": 0.7, "win_rate_ci95": [0.6, 0.8]}
    (folder / "run" / "summary.json").write_text(json.dumps({"control": control}))


def write_files(place: Place) -> None:
    write_model(initial(place).folder(place), 2.0, "on and on and on and on")
    for run in runs(place):
        if run.row == MAIN:
            write_run(place, run, (0.8 + run.seed / 100, 0.45, 0.5), 2.25)
        elif run.row == BASELINE:
            write_run(place, run, (0.55, 0.5 + run.seed / 1000, 0.5), 1.75)
        else:
            write_run(place, run, (0.65, 0.62, 0.5), 1.9)


def test_report_text_and_figure_are_what_the_files_say(place: Place, tmp_path: Path) -> None:
    write_files(place)
    report = json.loads(json.dumps(STUDY.report(place)))
    refuse_paths(report, (str(tmp_path),))
    first = report["rows"][MAIN][0]
    assert first["wins"]["likelihood"] == {"value": 0.81, "low": 0.73, "high": 0.89}
    assert first["nll_change"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert first["seconds"] == 9.0
    assert report["steps"] == 3
    assert report["hacked"] == [MAIN]
    assert report["initial"]["repetition_greedy"] > first["repetition_greedy"] == 0.0
    text = STUDY.section(report)
    lines = text.splitlines()
    [row] = [line for line in lines if line.startswith("| DPO, suffix + 4 rollouts |")]
    assert row.startswith(
        "| DPO, suffix + 4 rollouts | 3 | 82 (80 to 84) | 45.0 (45.0 to 45.0) | 50.0 (50.0 to 50.0) | 0.250 (0.250 to 0.250)"
    )
    [row] = [line for line in lines if line.startswith("| DPO, suffix + 8 rollouts |")]
    assert row.startswith("| DPO, suffix + 8 rollouts | 1 | 65 (57 to 73) | 62.0 (54.0 to 70.0) |")
    assert "| makes held-out text likelier (nats a token) | -0.250 (-0.250 to -0.250) | the opposite |" in text
    assert "3 of 8 claims hold with an interval that excludes zero: fewer than two thirds." in text
    told = " ".join(text.split())
    assert "Lost is the likelihood of held-out text in: DPO, suffix + 4 rollouts. What" in told
    assert (
        "prefers sampled continuations of the rows that it trained: DPO, suffix + 4 rollouts *: 62.0 (54.0 to 70.0)"
        in told
    )
    assert "70.0) percent, more than the initial policy's; DPO, 4 rollouts, suffix as pivot *" in told
    assert "wins 70 (60 to 80) by likelihood" in told
    assert "Whole pieces are learnt in fewer, smaller steps: 2,520 tokens, as of suffixes 2,559." in told
    STUDY.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_quick_report_has_the_rows_that_were_run(place: Place, tmp_path: Path) -> None:
    place = replace(place, quick=True, seeds=(1, 2))
    write_files(place)
    report = STUDY.report(place)
    assert list(report["rows"]) == [row for row in ROWS if row in {run.row for run in runs(place)}]
    assert STUDY.section(report)
    STUDY.draw(report, tmp_path / "figure.png")


def test_nll_changes_are_paired_by_task_and_weighed_by_tokens(tmp_path: Path) -> None:
    for name, nats in (("before", (3.0, 40.0)), ("after", (2.0, 44.0))):
        lines = [{"format": "header"}]
        lines += [
            {"index": i, "document": str(i), "tokens": tokens, "nll": nll}  # type: ignore[dict-item]
            for i, tokens, nll in ((0, 1, nats[0]), (1, 10, nats[1]))
        ]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = nll_change(tmp_path / "after", tmp_path / "before")
    assert found["value"] == pytest.approx((-1.0 + 4.0) / 11, abs=1e-5)
    assert (found["low"], found["high"]) == (-1.0, 0.4)  # resamples of one document alone are the extremes


def figures(own: float, other: float, nll: float) -> dict[str, Any]:
    wins = {"likelihood": own, "judge": other, "judge_greedy": other}
    around = {name: {"value": win, "low": win - 0.1, "high": win + 0.1} for name, win in wins.items()}
    change = {"value": nll, "low": nll - 0.01, "high": nll + 0.01}
    return {"seed": 1, "wins": around, "nll_change": change, "curves": {"chosen_rate/rollout": [0.5, 0.6, 0.9]}}


@pytest.mark.parametrize(
    ("row", "own", "other", "nll", "expected"),
    [
        (MAIN, 0.8, 0.3, 0.0, True),  # the other judge prefers the initial policy
        (MAIN, 0.8, 0.5, 0.1, True),  # held-out text became less likely
        (MAIN, 0.8, 0.8, -0.1, False),
        (MAIN, 0.55, 0.3, 0.1, False),  # its own judge is not won either
        ("judge-dpo-4", 0.3, 0.8, 0.0, True),  # the judge of that row is the pairwise one
        ("judge-dpo-4", 0.8, 0.3, 0.0, False),
        (BASELINE, 0.8, 0.3, 0.1, False),  # no judge trained it
    ],
)
def test_reward_hacking_is_the_own_judge_won_and_another_lost(
    row: str, own: float, other: float, nll: float, expected: bool
) -> None:
    assert hacked(row, [figures(own, other, nll)]) is expected


def test_claims_are_paired_by_seed_and_of_one_seed_nothing_holds() -> None:
    main = [figures(0.8, 0.6, -0.1) | {"seed": seed} for seed in (1, 2)]
    other = [figures(0.6 + seed / 100, 0.5, 0.0) | {"seed": seed} for seed in (2, 1)]
    cooler = {"value": 0.7, "low": 0.6, "high": 0.8}
    found = claims(main, other, cooler)
    assert found["wins more than next-token training on suffixes, by the judge that trained it"][
        "value"
    ] == pytest.approx(0.185)
    more = found["wins more by the judge that trained it than a cooler initial policy"]
    assert more == pytest.approx(
        {"value": 0.1, "low": 0.1 - 0.02**0.5, "high": 0.1 + 0.02**0.5}, abs=1e-5
    )  # of both win rates
    assert found["makes held-out text likelier (nats a token)"] == {"value": 0.1, "low": 0.09, "high": 0.11}
    alone = claims(main[:1], other, cooler)
    assert all(set(each) == {"value"} for each in alone.values())
    assert "0 of 8 claims hold" in claims_told(alone, 1)


def test_early_and_late_are_thirds_of_the_steps() -> None:
    assert late_less_early([0.1, 0.3, 0.5, 0.5, 0.7, 0.9]) == pytest.approx(0.6)
    assert late_less_early([0.4]) == 0.0
    assert late_less_early([None, 0.1, 0.5, None, 0.9]) == pytest.approx(0.8)
