"""What does sampling cooler alone do to toxicity, the control of study `toxicity`? Aimed at 15 minutes on two slow cores.

The initial model of that study behind the same toxic prompts, sampled at temperature 1, as there, and cooler, judged alike.
Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evidence.criteria import FOLDER
from evidence.study import EVAL_SETS, PYTHON, Part, Place, Report, Study, paragraph, table
from evidence.toxicity import continuations, judged_files, sizes
from evidence.toxicity_page import CLASSIFIERS, percent_change
from evidence.toxicity_report import CRITERIA, JUDGES, by_prompt, compared, values_of, words

NAME = "cooler"
TEXT = "prompts"
TEMPERATURES = (1.0, 0.7)
SEED = 1234
"""Of the server that samples."""


def parts(place: Place) -> list[Part]:
    """Fetch prompts and judges; sample and judge at each temperature."""
    fetch = (
        (PYTHON, "tools/fetch_toxicity.py", "--save", str(FOLDER)),
        (PYTHON, "tools/fetch_eval_sets.py", "--save", str(EVAL_SETS)),
    )
    made = [Part("text", fetch, (EVAL_SETS / "made_of.json",))]
    for one in TEMPERATURES:
        out = folder(place, one)
        commands = tuple(continuations(place, TEXT, out, place.smollm2, one))
        results = tuple(out / name for name in judged_files(TEXT))
        made.append(Part(f"at {one:g}", commands, results, served=place.smollm2))
    return made


def folder(place: Place, temperature: float) -> Path:
    """Where the files of one temperature lie."""
    return place.run_dir / NAME / f"at_{temperature:g}"


def report(place: Place) -> Report:
    """By temperature how toxic and how varied what it writes is, and the change from temperature 1 with its interval."""
    start = folder(place, TEMPERATURES[0])
    return {
        "settings": asdict(sizes(place)),
        "seeds": [SEED],
        "temperatures": {f"{one:g}": _at(folder(place, one), start) for one in TEMPERATURES},
    }


def _at(out: Path, start: Path) -> Report:
    found: Report = {}
    for criterion, name in (*zip(CRITERIA, JUDGES, strict=True), (CRITERIA[0], "any")):
        reduce = max if name == "any" else np.mean
        base = by_prompt([start], TEXT, criterion, reduce)
        found[name] = compared(base if out == start else by_prompt([out], TEXT, criterion, reduce), base)
    found["diversity"] = values_of([out], f"{TEXT}.diversity.json")
    found["words"] = words([out], TEXT)
    return found


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Toxicity by judge at each temperature."""
    figure = Figure(figsize=(6.4, 3.0), dpi=150, layout="constrained")
    axis = figure.subplots()
    for number, (name, one) in enumerate(found["temperatures"].items()):
        heights = np.array([one[judge]["value"] for judge in JUDGES])
        spans = np.abs(np.array([one[judge]["interval"] for judge in JUDGES]).T - heights)
        axis.bar(np.arange(len(JUDGES)) + 0.35 * number, heights, 0.35, yerr=spans, label=f"T={name}", capsize=2)
    axis.set_xticks(np.arange(len(JUDGES)) + 0.175, list(JUDGES.values()), fontsize=8)
    axis.set_ylabel("share, or mean probability, of toxicity")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def section(found: Mapping[str, Any]) -> str:
    """The table, and how it stands beside the study of toxicity."""
    heads = {"unlisted": "a listed word", "any": "in one of all", "mildness": "severity", **CLASSIFIERS}
    rows = [
        [
            name,
            *(percent_change(one[judge]) for judge in heads),
            f"{one['diversity']['distinct_2']['value']:.3f}",
            f"{100 * one['diversity']['repetition']['value']:.2f}",
            f"{one['words']:.1f}",
        ]
        for name, one in found["temperatures"].items()
    ]
    return "\n\n".join(
        [
            paragraph(
                "The initial model of the study of toxicity, behind the same prompts, judged alike, in percent; in brackets",
                "the change from temperature 1 with its 95% interval over prompts. What DPO changed there has to be seen",
                "beside it: a policy that only became surer of itself writes as cooler sampling does.",
            ),
            table(["temperature", *heads.values(), "distinct-2", "repetition, %", "words"], rows),
            "What it does not show: DPO's policy at other temperatures; it is one draw of the initial model's at each.",
        ]
    )


STUDY = Study(
    name=NAME,
    question="What does sampling cooler alone do to toxicity?",
    minutes=15,
    parts=parts,
    report=report,
    draw=draw,
    section=section,
)
