"""What does the method do to the standard tasks (the paper's table 3, small)? About 150 minutes on two cores with AVX2 alone.

SmolLM2-135M-Instruct, and what some ways of training of the study of objectives make of it with the first seed, on the first
questions of the paper's eight tasks. All answer the same questions, so that differences are paired, question by question.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evidence.numbers import Estimate, paired_shares, percent, share, sign
from evidence.objectives import BASELINE, MAIN, ROWS, WHOLE, training
from evidence.study import EVAL_SETS, PYTHON, Part, Place, Report, Study, paragraph, table
from megatron_sip.files import read_json_lines
from megatron_sip.serving.launch import served_dtype

NAME = "tasks"
LIMIT, QUICK_LIMIT = 300, 2
"""Questions of a task."""
INITIAL = "initial"
TRAINED = (BASELINE, WHOLE, "rf-nll", MAIN, "grpo")
"""Next tokens of suffixes and of whole pieces, and one of each other objective; each takes minutes to ask."""
ALL = "all questions"


def parts(place: Place) -> list[Part]:
    """Fetch the questions; ask the initial model; train each and ask it."""
    folder = place.run_dir / NAME
    leads = folder / "later_leads.jsonl"
    fetch = (PYTHON, "tools/fetch_eval_sets.py", "--save", str(EVAL_SETS))
    take = (PYTHON, "-m", "evidence.later_leads", str(place.wiki_leads), str(leads))
    found = [
        Part("texts", (fetch, take), (EVAL_SETS / "made_of.json", leads)),
        _asked(place, INITIAL, place.smollm2),
    ]
    for name in TRAINED:
        run_dir = folder / name / "run"
        words = training(place, name, place.seeds[0], run_dir, leads)
        model = run_dir / "hf"
        found += [
            Part(f"train {name}", (words,), (model / "config.json",), removed=(run_dir / "checkpoints",)),
            _asked(place, name, model),
        ]
    return found


def _asked(place: Place, name: str, model: Path) -> Part:
    answered = _questions(place, name)
    output = answered.with_name(answered.name.removesuffix(".questions.jsonl"))
    words = (
        *(PYTHON, "-m", "megatron_sip.evaluate", "tasks", "--model", str(model)),
        *("--tasks", "standard", "--include-path", str(EVAL_SETS), "--output", str(output)),
        *("--limit", str(QUICK_LIMIT if place.quick else LIMIT)),
    )
    return Part(f"ask {name}", (words,), (output, answered))


def _questions(place: Place, name: str) -> Path:
    return place.run_dir / NAME / name / "tasks.json.questions.jsonl"


def report(place: Place) -> Report:
    """By model and task the share of right answers, and of the trained ones how it changed, with intervals over questions."""
    answered = {name: right_answers(_questions(place, name)) for name in (INITIAL, *TRAINED)}
    return {"seeds": [place.seeds[0]], "dtype": served_dtype(place.smollm2, "auto"), **report_of(answered)}


Answers = dict[str, dict[tuple[str, int, str], bool]]
"""By task: by leaf task, question and what it was asked with, whether the answer is right."""


def right_answers(path: Path) -> Answers:
    """What a command wrote of each question."""
    found: Answers = {}
    for line in read_json_lines(path, "what each question of the tasks gave"):
        asked = line["task"], line["question"], line["prompt_hash"]
        found.setdefault(line["dataset"], {})[asked] = line["acc"] > 0
    return found


def report_of(answered: Mapping[str, Answers]) -> Report:
    """`report` of the answers by model."""
    start = answered[INITIAL]
    return {
        "questions": {task: len(answers) for task, answers in start.items()},
        "right": {
            name: {task: share(float(np.mean(list(each.values()))), len(each)) for task, each in answers.items()}
            for name, answers in answered.items()
        },
        "changes": {name: changes(answered[name], start) for name in TRAINED},
        "main_less_baseline": changes(answered[MAIN], answered[BASELINE]),
    }


def changes(after: Answers, before: Answers) -> dict[str, dict[str, Any]]:
    """By task, and of all questions alike: how many answers were gained and lost, and what that is of all."""
    pooled = [
        {(task, *asked): right for task, each in one.items() for asked, right in each.items()}
        for one in (after, before)
    ]
    return {task: _change(after[task], before[task]) for task in before} | {ALL: _change(*pooled)}


def _change(after: Mapping[Any, bool], before: Mapping[Any, bool]) -> dict[str, Any]:
    assert after.keys() == before.keys(), "other questions, or asked otherwise"
    now, then = ([one[asked] for asked in before] for one in (after, before))
    gained = sum(new and not old for new, old in zip(now, then, strict=True))
    lost = sum(old and not new for new, old in zip(now, then, strict=True))
    return {**paired_shares(now, then), "gained": gained, "lost": lost}


def draw(found: Mapping[str, Any], file: Path) -> None:
    """By task the change of each trained model, in points."""
    figure = Figure(figsize=(9.0, 3.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    tasks = list(found["changes"][MAIN])
    colours = {BASELINE: "#c8541b", WHOLE: "#d4a72c", "rf-nll": "#2f8f4e", MAIN: "#0b6bbf", "grpo": "#8250df"}
    step = 0.7 / len(found["changes"])
    for place, (name, changed) in enumerate(found["changes"].items()):
        each = [changed[task] for task in tasks]
        values = [100 * one["value"] for one in each]
        around = [
            [100 * (one["value"] - one["low"]) for one in each],
            [100 * (one["high"] - one["value"]) for one in each],
        ]
        shift = (place - (len(found["changes"]) - 1) / 2) * step
        places = [task + shift for task in range(len(tasks))]
        around_it, told = np.maximum(around, 0), ROWS[name].told
        axis.errorbar(places, values, around_it, fmt="o", color=colours[name], markersize=4, capsize=2, label=told)
    axis.axhline(0, color="#59636e", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
    axis.set_ylabel("points against the initial model")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def section(found: Mapping[str, Any]) -> str:
    """The table, and what follows from it."""
    tasks, start, less = list(found["questions"]), found["right"][INITIAL], found["main_less_baseline"]
    changed = {ROWS[name].told: each for name, each in found["changes"].items()} | {
        "DPO less next token, suffixes": less
    }
    rows = [
        ["questions", *(str(found["questions"][task]) for task in tasks), str(sum(found["questions"].values()))],
        [INITIAL, *(percent(start[task]) for task in tasks), ""],
        *([name, *(points(each[task]) for task in (*tasks, ALL))] for name, each in changed.items()),
    ]
    return "\n\n".join(
        [
            paragraph(
                "The first questions of each of the paper's eight tasks, as lm-eval asks them (MMLU with 5 examples, as many",
                f"of each subject), in {found.get('dtype', 'bfloat16')}: percent right of the initial model with Wilson's",
                "intervals; of the others the change in points, of paired answers to the same questions, with Newcombe's",
                "intervals. The JSON also says how many answers were gained and lost.",
            ),
            table(["", *tasks, ALL], rows),
            verdict(less[ALL], found["changes"]),
            paragraph(
                "What it does not show: what longer training does. All are trained as in the study of objectives, once, a",
                "few steps on Wikipedia leads, from which no task is learnt; several tasks are near chance for such a model.",
                "It shows whether the training broke anything that these questions can see.",
            ),
        ]
    )


def verdict(less: Estimate, changed: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Of all questions together, whether anything changed by the interval."""
    words = {1: "better", 0: "no difference that the interval shows", -1: "worse"}
    of_each = "; ".join(f"{ROWS[name].told}: {words[sign(each[ALL])]}" for name, each in changed.items())
    return paragraph(
        f"Of all questions together, against the initial model: {of_each}. DPO against next tokens of suffixes:",
        f"{words[sign(less)]}.",
    )


def points(found: Mapping[str, float]) -> str:
    """+1.2 (-0.3 to +2.7)."""
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


STUDY = Study(
    name=NAME,
    question="What does it do to the standard tasks?",
    minutes=150,
    parts=parts,
    report=report,
    draw=draw,
    section=section,
)
