"""Does a small judge learn to judge? Aimed at 90 minutes on two slow cores, most of it 60 steps of training.

SmolLM2-135M-Instruct, untrained and trained by examples/train_judge.sh (GRPO on pieces of Wikipedia leads and the same pieces
with their words shuffled), on pairs of other leads, spoilt in the way that it learnt and in four that it never saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evidence.numbers import Estimate, estimate, percent, share, sign
from evidence.study import PYTHON, SERVED_URL, Part, Place, Report, Study, paragraph, table
from megatron_sip.files import read_json

NAME = "judge"
LEARNT = "shuffle"
DOCUMENTS = {LEARNT: 130, "repeat": 130, "swap-sentences": 260, "swap-entities": 270, "numbers": 410}
"""By kind of corruption how many leads are read for about 120 pairs: not every lead has two sentences or a number."""
QUICK_DOCUMENTS = 12
QUICK = ("--train-iters", "1", "--lr-warmup-iters", "0", "--global-batch-size", "4", "--eval-records", "8")
MODELS = ("untrained", "trained")
TRAINING, LEADS, TEXTS = "training", "leads", "texts"
"""Parts that leave the trained judge, and what it is asked about; NAME judge, of MODELS, the answers."""
SEED = 1234
"""The trainer's own: the study has one training run."""
CURVES = {"right": "score/rollout", "option 1": "judge/label/first-shown-preferred"}


def trained_judge(place: Place) -> Path:
    """HF folder of the judge that the study trains."""
    return place.run_dir / NAME / "training" / "judge"


def later_leads(place: Place) -> Path:
    """Leads that it was not trained on."""
    return place.run_dir / NAME / "later_leads.jsonl"


def parts(place: Place) -> list[Part]:
    """Train, spoil texts, ask both judges."""
    folder = place.run_dir / NAME
    training = folder / "training"
    flags = ("--", *QUICK) if place.quick else ()
    train = ("examples/train_judge.sh", "--run-dir", str(training), *flags)
    leads = later_leads(place)
    take = (PYTHON, "-m", "evidence.later_leads", str(place.wiki_leads), str(leads))
    spoil = [_spoil(place, kind, QUICK_DOCUMENTS if place.quick else count) for kind, count in DOCUMENTS.items()]
    models = dict(zip(MODELS, (place.smollm2, trained_judge(place)), strict=True))
    return [
        Part(TRAINING, (train,), (training / "judge_training.json", trained_judge(place) / "config.json")),
        Part(LEADS, (take,), (leads,)),
        Part(TEXTS, tuple(spoil), tuple(_records(folder, kind) for kind in DOCUMENTS)),
        *(_asked(folder, name, model) for name, model in models.items()),
    ]


def _spoil(place: Place, kind: str, documents: int) -> tuple[str, ...]:
    cut = ("--seq-length", "40", "--suffix-length", "20", "--min-prefix-length", "20")  # as in training
    return (
        *(PYTHON, "-m", "megatron_sip.prepare", "judgements", "--task", "quality", "--corrupt", kind),
        *("--criterion", "examples/short_quality.txt", "--data-path", str(later_leads(place))),
        *("--role-shares", "0,1,0", "--split", "0,0,1", "--max-documents", str(documents)),
        *("--hf-config", str(place.smollm2), *cut, "--out", str(_records(place.run_dir / NAME, kind).parent)),
    )


def _asked(folder: Path, name: str, model: Path) -> Part:
    answers = {kind: _answers(folder, name, kind) for kind in DOCUMENTS}
    commands = tuple(
        (
            *(PYTHON, "-m", "megatron_sip.judge", "accuracy", str(_records(folder, kind)), "--split", "test"),
            *("--teacher-url", SERVED_URL, "--save", str(path)),
        )
        for kind, path in answers.items()
    )
    return Part(f"{name} judge", commands, tuple(answers.values()), served=model)


def _records(folder: Path, kind: str) -> Path:
    return folder / kind / "judgements.jsonl"


def _answers(folder: Path, name: str, kind: str) -> Path:
    return folder / kind / f"{name}.json"


def right_about_learnt(place: Place) -> Estimate:
    """How often the trained judge, by the mean of both orders, is right about pairs of the kind that it learnt."""
    accuracy = read_json(_answers(place.run_dir / NAME, "trained", LEARNT), "a judge's accuracy")
    return figures(accuracy)["mean_of_orders"]


def report(place: Place) -> Report:
    """By kind and judge its figures, and the course of the training."""
    folder = place.run_dir / NAME
    return {
        "seeds": [SEED],
        "kinds": {
            kind: {name: figures(read_json(_answers(folder, name, kind), "a judge's accuracy")) for name in MODELS}
            for kind in DOCUMENTS
        },
        "training": course(read_json(folder / "training" / "judge_training.json", "the report of a judge's training")),
    }


def figures(accuracy: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `megatron_sip.judge accuracy` says: shares with their intervals; each is of records, or of pairs."""
    found = accuracy["all"]
    pairs = found["pairs"]
    return {
        "pairs": pairs,
        "right": estimate(found["accuracy"], *found["accuracy_ci95"]),
        "right_where_1_is": share(found["by_verdict"]["1"], pairs),
        "right_where_2_is": share(found["by_verdict"]["2"], pairs),
        "mean_of_orders": share(found["both_orders"], pairs),
        "each_order": share(found["in_each_order"], pairs),
        "option_1": share(found["first_option"], pairs),
    }


def course(training: Mapping[str, Any]) -> dict[str, Any]:
    """Of benchmarks/judge_training.py's report what stands in the page."""
    curves = {
        shown: next(values for name, values in training["curves"].items() if name.startswith(start))
        for shown, start in CURVES.items()
    }
    return {"steps": training["steps"], "step_seconds": training["step_seconds"], "curves": curves}


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Left the training's course, right both judges by kind of corruption."""
    figure = Figure(figsize=(9.0, 3.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for (name, values), colour in zip(found["training"]["curves"].items(), ("#0b6bbf", "#c8541b"), strict=True):
        left.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.2, label=name)
    left.set(xlabel="optimizer step", ylabel="share of verdicts in training", ylim=(0, 1.02))
    places = range(len(found["kinds"]))
    for shift, name, colour in ((-0.18, "untrained", "#9aa4ad"), (0.18, "trained", "#0b6bbf")):
        shares = [kind[name]["mean_of_orders"] for kind in found["kinds"].values()]
        values = [each["value"] for each in shares]
        around = [[e["value"] - e["low"] for e in shares], [e["high"] - e["value"] for e in shares]]
        right.bar([place + shift for place in places], values, 0.34, yerr=around, color=colour, label=name, capsize=2)
    right.set_xticks(list(places), list(found["kinds"]), fontsize=8)
    right.set(ylabel="pairs right by both orders' mean", ylim=(0, 1.05))
    for axis in (left, right):
        axis.axhline(0.5, color="#59636e", linewidth=0.8, linestyle="--")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def section(found: Mapping[str, Any]) -> str:
    """The table, and what follows from it."""
    columns = {
        "right": "right",
        "where option 1 is": "right_where_1_is",
        "where option 2 is": "right_where_2_is",
        "option 1 chosen": "option_1",
        "pairs, by the mean of orders": "mean_of_orders",
        "pairs, in each order": "each_order",
    }
    rows = [
        [kind, name, str(by_model[name]["pairs"]), *(percent(by_model[name][key]) for key in columns.values())]
        for kind, by_model in found["kinds"].items()
        for name in MODELS
    ]
    steps = found["training"]["steps"]
    return "\n\n".join(
        [
            paragraph(
                f"SmolLM2-135M-Instruct as a judge of two texts, before and after {steps} steps of GRPO on pairs of which one",
                f"has its words shuffled (`{LEARNT}`); the other kinds of corruption were never trained. Leads that training",
                "did not see, each pair in both orders. Percent with 95% intervals. Chance is 50, of pairs in each order 25; a",
                "judge that goes by the place alone is right about no pair in each order.",
            ),
            table(["corruption", "judge", "pairs", *columns], rows),
            paragraph(verdict(found["kinds"])),
            "A judge knows what it was shown, and pieces of 20 tokens show little: none of this says that it knows good text.",
        ]
    )


def verdict(kinds: Mapping[str, Any]) -> str:
    """Which kinds each judge tells from the original, by the intervals."""
    sentences = []
    for name in MODELS:
        groups: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for kind, by_model in kinds.items():
            groups[sign(by_model[name]["mean_of_orders"], 0.5)].append(kind)
        told = [
            f"{words} chance in {', '.join(groups[which])}"
            for which, words in ((1, "above"), (0, "not distinguishable from"), (-1, "below"))
            if groups[which]
        ]
        sentences.append(f"The {name} judge, by the mean of both orders, is {'; '.join(told)}.")
    return " ".join(sentences)


STUDY = Study(
    name=NAME,
    question="Does a small judge learn to judge, and what?",
    minutes=90,
    parts=parts,
    report=report,
    draw=draw,
    section=section,
)
