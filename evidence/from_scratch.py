"""From scratch (figure 8 in small): when does a judge begin to prefer what the policy writes to the text itself?

A model of 7 million weights is pretrained plainly on Wikipedia leads. From three of its stages, random weights among them, it
goes on by RF-NLL of the suffix against one rollout, chosen by the likelihood of SmolLM2-135M-Instruct, with rollouts at the
paper's temperature and with surer ones; from the last one also by next-token loss on suffixes. The paper's judge has 8 billion
weights, its run 21,000 steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from evidence.study import PYTHON, Part, Place, Report, Study, paragraph, table
from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.plots import moving_average
from megatron_sip.evaluation.win_rate import wilson_interval
from megatron_sip.files import read_json_lines
from megatron_sip.training.metrics_writer import read_metrics

NAME = "from_scratch"
NLL, CHOSEN, CHANCE, GROUPS = "validation/nll/suffix", "chosen_rate/rollout", "chosen_chance/rollout", "examples"
SCORES = {"rollout": "score/rollout", "suffix": "score/suffix"}
"""Means of a step's likelihoods by the judge, nats a token."""
RF_NLL, SFT = "RF-NLL", "next token"
TEMPERATURES = (1.0, 0.3)
"""Of the rollouts: the paper's, and one at which a small model's are nearly its likeliest."""
SEED = 1234
"""Of the runs that go on; one each."""
WINDOW = 10
"""Steps that the figure's line is a mean of."""


@dataclass(frozen=True)
class Sizes:
    """plain: steps of plain pretraining, 16 pieces of up to 128 tokens each, at which RF-NLL starts. after: its steps there, 16
    prefixes each."""

    plain: tuple[int, ...] = (0, 150, 900)
    after: tuple[int, ...] = (40, 40, 120)


QUICK = Sizes(plain=(0, 2), after=(2, 2))
QUICK_FLAGS = ("--lr-warmup-iters", "0")
"""A warm-up must be shorter than the run."""


def sizes(place: Place) -> Sizes:
    return QUICK if place.quick else Sizes()


def folder(place: Place) -> Path:
    return place.run_dir / NAME


def pretrained(place: Place, steps: int) -> Path:
    """The run folder of the model after so many plain steps."""
    return folder(place) / f"plain_{steps}"


def continued(place: Place, objective: str, steps: int, temperature: float = 1.0) -> Path:
    """The run folder of what goes on from there."""
    return folder(place) / f"{objective.replace(' ', '_')}{_at(temperature).replace(' ', '_')}_after_{steps}"


def _at(temperature: float) -> str:
    return "" if temperature == 1 else f" at {temperature:g}"


def parts(place: Place) -> list[Part]:
    """The random model, then by turns plain pretraining and RF-NLL from where it stands."""
    size = sizes(place)
    start = pretrained(place, 0)
    words = (PYTHON, "-m", "evidence.scratch_model", "--text", str(place.wiki_leads), "--save", str(start / "hf"))
    made = [Part("random weights", (words,), (start / "hf" / "config.json",))]
    before = 0
    for number, (steps, after) in enumerate(zip(size.plain, size.after, strict=True)):
        if steps:
            # Another seed, since each stretch is a run of its own and would else begin with the first one's pieces.
            flags = ("evidence/from_scratch_plain.args", "--train-iters", str(steps - before), "--seed", str(number))
            made.append(training(place, f"plain, {steps} steps", before, pretrained(place, steps), *flags))
            before = steps
        rf_nll = ("--objective", "rf-nll", "--candidates", "suffix", "rollout", "--num-rollouts", "1")
        judge = ("--criteria", "likelihood=1", "--teacher", str(place.smollm2))
        made += [going_on(place, RF_NLL, steps, after, *rf_nll, *judge, temperature=one) for one in TEMPERATURES]
    made.append(going_on(place, SFT, before, size.after[-1], "--objective", "sft", "--sft-target", "suffix"))
    return made


def going_on(place: Place, objective: str, steps: int, after: int, *flags: str, temperature: float = 1.0) -> Part:
    """`after` steps of an objective from the model of `steps` plain ones."""
    run_dir, at = continued(place, objective, steps, temperature), _at(temperature)
    flags = (*flags, "--rollout-temperature", f"{temperature:g}") if at else flags
    every = ("--train-iters", str(after), "--eval-interval", str(min(after, 20)))
    return training(
        place, f"{objective}{at} after {steps}", steps, run_dir, "evidence/from_scratch.args", *every, *flags
    )


def training(place: Place, name: str, steps: int, run_dir: Path, preset: str, *flags: str) -> Part:
    """A run of the command for one node, from the model of `steps` plain steps."""
    model = pretrained(place, steps) / "hf"
    words = (PYTHON, "-m", "megatron_sip", str(model), str(place.wiki_leads), "--run-dir", str(run_dir))
    results = (run_dir / "summary.json", run_dir / "hf" / "config.json")
    command = (*words, "--preset", preset, *flags, *(QUICK_FLAGS if place.quick else ()))
    return Part(name, (command,), results, removed=(run_dir / "checkpoints",))


def report(place: Place) -> Report:
    size = sizes(place)
    same = min(size.after)
    stages = [
        {"temperature": one, **stage(continued(place, RF_NLL, steps, one), steps, same)}
        for one in TEMPERATURES
        for steps in size.plain
    ]
    plain = stage(continued(place, SFT, size.plain[-1]), size.plain[-1], same)
    return {"settings": asdict(size), "seeds": [SEED], RF_NLL: stages, SFT: plain}


def stage(run_dir: Path, steps: int, same: int) -> Report:
    """What a run from the model of `steps` plain steps was: held-out nats a token over its steps; how often a rollout was
    chosen and how likely the judge found both texts, step by step, and in the first `same` steps, as many as all stages have;
    none of that where none competed."""
    metrics = read_metrics(run_dir / "metrics.jsonl")
    nats = [[int(step["step"]), round(step[NLL], 4)] for step in metrics if NLL in step]
    found: Report = {"plain_steps": steps, "nll": nats}
    judged = [step for step in metrics if CHOSEN in step]
    if judged:
        chosen, groups = ([step[name] for step in judged if step["step"] <= same] for name in (CHOSEN, GROUPS))
        share, count = float(np.average(chosen, weights=groups)), int(sum(groups))
        found |= {
            "chosen_by_step": [round(step[CHOSEN], 4) for step in judged],
            "groups": count,
            "chosen": round(share, 4),
        }
        found["chosen_interval"] = [round(end, 4) for end in wilson_interval(share, count)]
        found["chance"] = round(float(np.mean([step[CHANCE] for step in judged])), 4)
        by_step = {kind: [round(step[name], 3) for step in judged] for kind, name in SCORES.items()}
        found["scores_by_step"] = by_step
        found["repetition"] = round(repetition(run_dir / "samples.jsonl"), 4)
        found["scores"] = {kind: round(float(np.mean(values[:same])), 3) for kind, values in by_step.items()}
    return found


def repetition(samples: Path) -> float:
    """The share of 4-grams that repeat an earlier one of the same rollout, in the later half of a run's samples."""
    lines = read_json_lines(samples, "samples of a run")
    later = lines[len(lines) // 2 :]
    return diversity([one["text"] for line in later for one in line["candidates"] if one["kind"] == "rollout"])[
        "repetition"
    ]


def draw(found: Mapping[str, Any], png: Path) -> None:
    """Over the steps from each stage: the share of rollouts chosen, how likely the judge found them, held-out nats a token;
    surer rollouts dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 3.4), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = dict(zip(found["settings"]["plain"], ("#8c959f", "#d4a72c", "#0b6bbf"), strict=False))
    for one in found[RF_NLL]:
        colour, line = colours[one["plain_steps"]], "-" if one["temperature"] == 1 else "--"
        label = f"after {one['plain_steps']}, T={one['temperature']:g}"
        chosen = moving_average(np.array(one["chosen_by_step"]), WINDOW)
        left.plot(np.arange(1, len(chosen) + 1), chosen, line, color=colour, linewidth=1.2, label=label)
        scores = moving_average(np.array(one["scores_by_step"]["rollout"]), WINDOW)
        middle.plot(np.arange(1, len(scores) + 1), scores, line, color=colour, linewidth=1.2)
        right.plot(*zip(*one["nll"], strict=True), line, marker="o", color=colour, linewidth=1.2, markersize=3)
    right.plot(*zip(*found[SFT]["nll"], strict=True), "o-", color="#c8541b", linewidth=1.0, markersize=3, label=SFT)
    left.axhline(found[RF_NLL][0]["chance"], color="#59636e", linewidth=0.8, linestyle=":", label="by chance")
    suffixes = float(np.mean([one["scores"]["suffix"] for one in found[RF_NLL]]))
    middle.axhline(suffixes, color="#59636e", linewidth=0.8, linestyle=":", label="suffixes")
    left.set_ylim(-0.02, 1)
    left.set_ylabel(f"rollouts chosen, mean of {WINDOW} steps")
    middle.set_ylabel("likelihood of rollouts, nats a token")
    right.set_ylabel("held-out nats a token of the suffix")
    for axis in (left, middle, right):
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(png)


def section(found: Mapping[str, Any]) -> str:
    """Markdown of a report."""
    same = min(found["settings"]["after"])
    rows = [
        [
            f"{one['plain_steps']}",
            f"{one['temperature']:g}",
            f"{one['nll'][0][1]:.3f}",
            f"{one['nll'][-1][1]:.3f} after {one['nll'][-1][0]}",
            _percent(one["chosen"], one["chosen_interval"]),
            _percent(*late(one, same)),
            f"{one['groups']}",
            f"{one['scores']['rollout']:.2f}",
            f"{one['scores']['suffix']:.2f}",
            f"{100 * one['repetition']:.0f}",
        ]
        for one in found[RF_NLL]
    ]
    head = [
        "plain steps before",
        "temperature",
        "nats a token there",
        "and after RF-NLL",
        f"rollouts chosen in {same} steps (95%)",
        "in their later half",
        "groups",
        "likelihood of rollouts",
        "of suffixes",
        "repetition of rollouts, %",
    ]
    stages = {one: [stage for stage in found[RF_NLL] if stage["temperature"] == one] for one in TEMPERATURES}
    last, plain = stages[1.0][-1], found[SFT]
    blocks = [
        "A model of 7 million weights learns Wikipedia leads plainly, 16 pieces of up to 128 tokens a step. From three stages "
        "it goes on by RF-NLL of the suffix (16 tokens behind up to 48) against one rollout, 16 groups a step, chosen by their "
        f"likelihood under SmolLM2-135M-Instruct (nats a token, means of the first {same} steps). By chance a rollout is "
        f"chosen in {100 * last['chance']:.0f}% of the groups; the later half was looked at once the figure "
        "was seen. Repetition is the share of a rollout's 4-grams that it wrote "
        "before, late in the run: where it is high the model has learnt from its surest rollouts to say the same again and "
        "again, which a likelihood takes for better than text.",
        table(head, rows),
        *(f"At temperature {one:g}: {told(of_it, same)}" for one, of_it in stages.items()),
        f"Next-token loss on suffixes alone, from the last stage and for as many steps, ends at {plain['nll'][-1][1]:.3f} nats "
        f"a token, RF-NLL at {last['nll'][-1][1]:.3f}, with surer rollouts at "
        f"{stages[TEMPERATURES[-1]][-1]['nll'][-1][1]:.3f}; one run each, so that what two seeds differ by is not known. A "
        "likelihood favours bland text, and its model is itself small: what a judge that reads would choose is not shown.",
    ]  # fmt: skip
    return "\n\n".join(block if block.startswith("|") else paragraph(block) for block in blocks)


def late(one: Mapping[str, Any], same: int) -> tuple[float, tuple[float, float]]:
    """The share of rollouts chosen in the later half of a run's first `same` steps, all of equally many groups, with Wilson's
    interval: the model has learnt from its own rollouts by then."""
    steps = one["chosen_by_step"][:same]
    later = steps[len(steps) // 2 :]
    share = float(np.mean(later))
    return share, wilson_interval(share, one["groups"] * len(later) // len(steps))


def told(stages: Sequence[Mapping[str, Any]], same: int) -> str:
    """When the judge begins to prefer rollouts, as far as the intervals tell."""
    following = list(pairwise(stages))
    rising = [two for one, two in following if two["chosen_interval"][0] > one["chosen_interval"][1]]
    falling = [two for one, two in following if two["chosen_interval"][1] < one["chosen_interval"][0]]
    moves = [
        f"the share is {word} after {_steps(moved)} plain steps than at the stage before, beyond both intervals."
        for word, moved in (("higher", rising), ("lower", falling))
        if moved
    ] or ["no stage's share differs from the one's before it beyond both intervals."]
    early = [one for one in stages if one["chosen_interval"][0] > one["chance"]]
    later = [one for one in stages if late(one, same)[1][0] > one["chance"]]
    if early:
        moves.append(f"Rollouts are preferred to the text, beyond chance, after {_steps(early)} plain steps.")
    if later:
        repeated = " and ".join(f"{100 * one['repetition']:.0f}" for one in later)
        moves.append(
            f"In the later half of these steps rollouts are preferred after {_steps(later)} plain steps: by then {repeated}% "
            "of their 4-grams are repetitions."
        )
    if not early and not later:
        moves.append("At none of these stages are rollouts preferred to the text: that takes a better model.")
    return " ".join(moves)


def _steps(stages: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(str(one["plain_steps"]) for one in stages)


def _percent(share: float, interval: Sequence[float]) -> str:
    return f"{100 * share:.1f}% ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


STUDY = Study(
    name=NAME,
    question="From scratch: when does a judge begin to prefer rollouts to the text?",
    minutes=60,
    parts=parts,
    report=report,
    draw=draw,
    section=section,
)
