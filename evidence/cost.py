"""What does judging cost, and what does cheaper judging lose? Aimed at 90 minutes on two slow cores, after `judge`.

Groups of a suffix and 15 rollouts, recorded by a short run, are judged again by the judge of study `judge`, under each
protocol, and by likelihood. What all pairs say by soft verdicts in both orders is taken as the truth about this judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evidence.asking import EVERYTHING, LIKELIHOOD, PROTOCOLS
from evidence.judge import LEADS, TEXTS, TRAINING, later_leads, right_about_learnt, trained_judge
from evidence.numbers import Estimate, estimate, percent, share
from evidence.objectives import PRESET
from evidence.study import PYTHON, SERVED_URL, Part, Place, Report, Study, paragraph, table
from megatron_sip.files import read_json

NAME = "cost"
ROLLOUTS, STEPS, PREFIXES = 15, 2, 10
QUICK = ("--train-iters", "1", "--global-batch-size", "2")
SEED = 1234
FAILED = "failed/"
"""Counters of calls that failed, by kind."""


def parts(place: Place) -> list[Part]:
    """Record groups, then ask about them under each protocol."""
    folder = place.run_dir / NAME
    run_dir, groups = folder / "run", folder / "groups"
    record = (
        *(PYTHON, "-m", "megatron_sip", str(place.smollm2), str(later_leads(place)), "--run-dir", str(run_dir)),
        *(
            "--teacher",
            str(place.smollm2),
            "--preset",
            PRESET,
            "--objective",
            "dpo",
            "--candidates",
            "suffix",
            "rollout",
        ),
        *("--num-rollouts", str(ROLLOUTS), "--train-iters", str(STEPS), "--lr-warmup-iters", "0"),
        *("--global-batch-size", str(PREFIXES)),
        *("--save-groups", str(groups), *(QUICK if place.quick else ())),
    )
    return [
        Part(
            "record groups", (record,), (run_dir / "summary.json",), removed=(run_dir / "checkpoints", run_dir / "hf")
        ),
        _asked(place, "ask the judge", tuple(PROTOCOLS), trained_judge(place)),
        _asked(place, "ask for likelihoods", (LIKELIHOOD,), place.smollm2),
    ]


def _asked(place: Place, name: str, protocols: Sequence[str], served: Path) -> Part:
    folder = place.run_dir / NAME
    commands = tuple(
        (
            *(PYTHON, "-m", "evidence.asking", str(folder / "groups"), "--protocol", protocol, "--url", SERVED_URL),
            *("--tokenizer", str(place.smollm2), "--save", str(_answers(folder, protocol))),
        )
        for protocol in protocols
    )
    return Part(name, commands, tuple(_answers(folder, protocol) for protocol in protocols), served=served)


def _answers(folder: Path, protocol: str) -> Path:
    return folder / f"{protocol.replace(', ', '_').replace(' ', '_')}.json"


def report(place: Place) -> Report:
    """How good the judge is on what it learnt; by protocol calls, tokens and seconds a group, and how good its best and worst
    are by all pairs."""
    folder = place.run_dir / NAME
    answers = {name: read_json(_answers(folder, name), "answers of a judge") for name in (*PROTOCOLS, LIKELIHOOD)}
    return {"judge": right_about_learnt(place), **report_of(answers)}


def report_of(answers: Mapping[str, Mapping[str, Any]]) -> Report:
    """The protocols of `report`, of what `evidence.asking` wrote. Groups of which one judged only a part are left out, and
    counted."""
    verdicts, scores = answers[EVERYTHING]["verdicts"], {name: found["scores"] for name, found in answers.items()}
    count = len(verdicts)
    sizes = [max(map(len, kinds)) for kinds in zip(*(found["kinds"] for found in answers.values()), strict=True)]

    def is_whole(group: int) -> bool:
        lengths = {len(each[group] or ()) for each in scores.values()}
        return lengths == {sizes[group]} and len(verdicts[group]) == sizes[group] * (sizes[group] - 1)

    whole = [group for group in range(count) if is_whole(group)]
    truth = [np.array(scores[EVERYTHING][i], float) for i in whole]
    asked = {
        name: {
            "calls": round(found["calls"] / count, 1),
            "tokens": round(found["prompt_tokens"] / count),
            "seconds": round(found["seconds"] / count, 2),
            "failed": {
                kind: number for kind, number in found["counters"].items() if kind.startswith(FAILED) and number
            },
            **selection([np.array(scores[name][i], float) for i in whole], truth),
        }
        for name, found in answers.items()
    }
    judged = [sizes[group] for group in whole]
    return {
        "seeds": [SEED],
        "groups": len(whole),
        "left_out": count - len(whole),
        "candidates": [min(judged), max(judged)],
        "protocols": asked,
    }


def selection(scores: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, Estimate]:
    """Against the truth [n] of each group: whether scores [n] have the same best and worst; the share of the gap between the
    true best and worst that theirs have, with a normal interval over groups. Ties are broken by lot."""
    draws = np.random.default_rng(SEED)
    picked = [best_and_worst(found, draws) for found in scores]
    right = [best_and_worst(true, draws) for true in truth]
    best, worst = (np.array([a[k] == b[k] for a, b in zip(picked, right, strict=True)], float) for k in (0, 1))
    gaps = np.array([(true[a] - true[b]) / max(np.ptp(true), 1e-9) for true, (a, b) in zip(truth, picked, strict=True)])
    half = 1.96 * float(gaps.std(ddof=1)) / len(gaps) ** 0.5 if len(gaps) > 1 else 1.0
    return {
        "same_best": share(float(best.mean()), len(best)),
        "same_worst": share(float(worst.mean()), len(worst)),
        "recovered": estimate(float(gaps.mean()), float(gaps.mean()) - half, float(gaps.mean()) + half),
    }


def best_and_worst(scores: np.ndarray, draws: np.random.Generator) -> tuple[int, int]:
    """Places of the highest and of the lowest of scores [n]."""
    order = np.lexsort((draws.permutation(len(scores)), scores))
    return int(order[-1]), int(order[0])


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Calls against the share of the gap that is recovered."""
    figure = Figure(figsize=(7.4, 3.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    for name, each in found["protocols"].items():
        gap = each["recovered"]
        around = np.maximum([[gap["value"] - gap["low"]], [gap["high"] - gap["value"]]], 0)
        axis.errorbar([each["calls"]], [gap["value"]], yerr=around, fmt="o", capsize=2, label=name)
    axis.set(xscale="log", xlabel="judge calls a group", ylabel="share of the best-worst gap", ylim=(-0.2, 1.05))
    axis.set_xticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"], minor=False)
    axis.tick_params(axis="x", which="minor", labelbottom=False)
    figure.legend(frameon=False, fontsize=7, loc="outside right center")
    figure.savefig(file)


def section(found: Mapping[str, Any]) -> str:
    """The table, and what its rows are."""
    rows = [
        [
            name,
            f"{each['calls']:.0f}",
            f"{each['tokens']:,}",
            f"{each['seconds']:.1f}",
            *(percent(each[key]) for key in ("recovered", "same_best", "same_worst")),
        ]
        for name, each in found["protocols"].items()
    ]
    low, high = found["candidates"]
    texts = f"{low}" if low == high else f"{low} to {high}"
    asked_again = second_askings(found["protocols"][EVERYTHING], low * (low - 1)) if low == high else ""
    left = f" {found['left_out']} more could not be judged under every protocol." if found["left_out"] else ""
    return "\n\n".join(
        [
            paragraph(
                f"{found['groups']} groups of {texts} different texts (a suffix and {ROLLOUTS} rollouts of 20 tokens),",
                "judged again by a judge trained as in the first study with soft verdicts, each of one generated token, under",
                f"each protocol, with the server's cache empty at first.{left} The judge, by the mean of both orders, is right",
                f"about {percent(found['judge'])} percent of held-out pairs of the kind that it learnt. By all pairs in both",
                "orders: the share of the gap between best and worst that the selected two have, and how often they are the",
                "same two, in percent with intervals over groups. Likelihood is another criterion, by the initial policy's",
                "weights: it need not agree.",
            ),
            table(["protocol", "calls", "prompt tokens", "s", "gap recovered", "same best", "same worst"], rows),
            paragraph(
                f"Calls, each a verdict, tokens and seconds are of one group.{asked_again} The paper's votes are sampled",
                "from answers that are begun as in this judge's training, up to three to a question, whose prompt is counted",
                "once. They are sharper than probabilities, which is counted against them; and the soft protocols ask again",
                "for verdicts that all pairs have as well, so that they find what they are measured by. A judge that reasons",
                "first, as the paper's does, would generate hundreds of tokens for each of its votes.",
                "What it does not show: whose selection is right; this says how cheaply this judge's own opinion is had. What",
                "another training of the judge would give is in no interval.",
            ),
        ]
    )


def second_askings(everything: Mapping[str, Any], planned: int) -> str:
    """A sentence about the calls of a group that were made again, and why; nothing where there were none."""
    again = everything["calls"] - planned
    kinds = ", ".join(f"{kind.removeprefix(FAILED)} {number:g}" for kind, number in everything["failed"].items())
    why = f"of calls that failed (in all groups: {kinds})" if kinds else "of calls without a verdict"
    return (
        f" Of the calls of {EVERYTHING} {again:.1f} are second askings, {why}; its seconds hold them." if again else ""
    )


STUDY = Study(
    name=NAME,
    question="What does judging cost, and what does cheaper judging lose?",
    minutes=90,
    parts=parts,
    report=report,
    draw=draw,
    section=section,
    needs={"judge": (TRAINING, LEADS, TEXTS, "trained judge")},
)
