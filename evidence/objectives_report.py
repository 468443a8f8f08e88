"""What the study of objectives found: by row its figures, the claims of the main comparison, reward hacking; their section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evidence.judge import LEADS, TRAINING
from evidence.numbers import Estimate, decimal, difference, estimate, mean_difference, over_seeds, percent, sign
from evidence.objectives import BASELINE, MAIN, NAME, PRESET, ROWS, WHOLE, Run, initial, parts, runs
from evidence.study import ROOT, Place, Report, Study, paragraph, table
from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.generation import read_generations
from megatron_sip.evaluation.nll import WHAT
from megatron_sip.evaluation.results import read_results
from megatron_sip.files import read_json, read_json_lines
from megatron_sip.training.metrics_writer import read_metrics

WINS = {"likelihood": "likelihood.json", "judge": "judge.json", "judge_greedy": "judge_greedy.json"}
"""By judge and sampling, where the win rate over the initial policy stands; of the likelihood, sampled alone."""
WINS_DIGITS = {"likelihood": 0, "judge": 1, "judge_greedy": 1}
"""Behind the point, of percent: the other judge's win rates are near a half."""
DIVERSITY = ("repetition", "distinct_3")
LEARNT = "target_tokens"
"""Of a step, the tokens of NLL's targets; other objectives have none."""
CURVES = ("loss", "chosen_rate/rollout", "chosen_chance/rollout", "score/rollout", "score/suffix")


def report(place: Place) -> Report:
    """Figures of every run, by row; of the initial policy; the claims; what looks like reward hacking."""
    first = initial(place)
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in runs(place):
        rows.setdefault(run.row, []).append({"seed": run.seed, **figures(run.folder(place), first.folder(place))})
    control = read_json(Run(MAIN, place.seeds[0]).folder(place) / "run" / "summary.json", "a run's summary")["control"]
    settings = (ROOT / PRESET).read_text(encoding="utf-8").splitlines()
    alone = estimate(control["win_rate"], *control["win_rate_ci95"])
    return {
        "settings": [line for line in settings if not line.startswith("#")],
        "steps": max(len(run["curves"]["loss"]) for run in rows[MAIN]),
        "initial": measured(first.folder(place)),
        "control": alone,
        "rows": rows,
        "claims": claims(rows[MAIN], rows[BASELINE], alone),
        "hacked": [name for name, found in rows.items() if hacked(name, found)],
    }


def measured(folder: Path) -> dict[str, Any]:
    """Of one model: nats a token of held-out suffixes, repetition and distinct-3 of both continuations."""
    nll = read_results(folder / "nll.json").results[0]
    assert nll.interval is not None
    found: dict[str, Any] = {"nll": estimate(nll.value, *nll.interval)}
    for name in ("sampled", "greedy"):
        shares = diversity([line.text for line in read_generations(folder / f"{name}.jsonl").lines])
        found |= {f"{kind}_{name}": round(shares[kind], 5) for kind in DIVERSITY}
    return found


def figures(folder: Path, initial_folder: Path) -> dict[str, Any]:
    """Of one trained model: `measured`, win rates and the change of NLL with intervals over documents, curves, seconds."""
    wins = {}
    for name, file in WINS.items():
        [result] = read_results(folder / file).results
        assert result.interval is not None
        wins[name] = estimate(result.value, *result.interval)
    steps = [step for step in read_metrics(folder / "run" / "metrics.jsonl") if "seconds/total" in step]
    return {
        **measured(folder),
        "wins": wins,
        "nll_change": nll_change(folder / "nll.json.suffix.jsonl", initial_folder / "nll.json.suffix.jsonl"),
        "seconds": round(sum(step["seconds/total"] for step in steps), 1),
        **({"tokens": int(sum(step.get(LEARNT, 0) for step in steps))} if LEARNT in steps[0] else {}),
        "curves": {name: curve(steps, name) for name in CURVES if any(name in step for step in steps)},
    }


def curve(steps: Sequence[Mapping[str, float]], name: str) -> list[float | None]:
    """A metric by step, None where a step has it not."""
    return [round(step[name], 4) if name in step else None for step in steps]


def nll_change(after: Path, before: Path) -> Estimate:
    """How many nats a token held-out suffixes cost more than by the initial policy, task by task."""
    lines, earlier = ({line["index"]: line for line in read_json_lines(path, WHAT)[1:]} for path in (after, before))
    now, then = ({i: line["nll"] / line["tokens"] for i, line in each.items()} for each in (lines, earlier))
    documents = {i: line["document"] for i, line in lines.items()}
    return mean_difference(now, then, documents, {i: float(line["tokens"]) for i, line in lines.items()})


def claims(
    main: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], control: Estimate
) -> dict[str, Estimate]:
    """What the method is said to do, as differences that are above 0 where it does it. control: the win rate of the initial
    policy that is only sampled cooler.

    An interval adds, as independent errors, that over seeds and those over the documents, which all seeds share.
    """
    other = {run["seed"]: run["wins"] for run in baseline}

    def wins(judge: str) -> list[Estimate]:
        return [run["wins"][judge] for run in main]

    def theirs(judge: str) -> list[Estimate]:
        return [other[run["seed"]][judge] for run in main]

    none, half = ([{"value": value}] * len(main) for value in (0.0, 0.5))
    rose = [late_less_early(run["curves"]["chosen_rate/rollout"]) for run in main]
    return {
        "is preferred to the initial policy by the judge that trained it": difference(wins("likelihood"), half),
        "wins more by the judge that trained it than a cooler initial policy": difference(
            wins("likelihood"), [control] * len(main)
        ),
        "is preferred to the initial policy by the other judge, sampled": difference(wins("judge"), half),
        "is preferred to the initial policy by the other judge, greedy": difference(wins("judge_greedy"), half),
        "wins more than next-token training on suffixes, by the judge that trained it": difference(
            wins("likelihood"), theirs("likelihood")
        ),
        "wins more than next-token training on suffixes, by the other judge": difference(
            wins("judge"), theirs("judge")
        ),
        "makes held-out text likelier (nats a token)": difference(none, [run["nll_change"] for run in main]),
        "chooses rollouts more often late in training than early": over_seeds(rose),
    }


def late_less_early(values: Sequence[float | None]) -> float:
    """The mean of the last third of the steps less that of the first; steps without a value (nobody competed) are left out."""
    rates = [rate for rate in values if rate is not None]
    third = max(1, len(rates) // 3)
    return float(np.mean(rates[-third:]) - np.mean(rates[:third]))


def hacked(name: str, found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the judge of the training is won and something that it did not look at is `lost`, by the intervals of the first
    seed. A row that no judge trained has none to please."""
    own = "judge" if ROWS[name].judge else "likelihood"
    return ROWS[name].asks and sign(found[0]["wins"][own], 0.5) > 0 and bool(lost(name, found))


def lost(name: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which are lost, of the other judge's preference and the likelihood of held-out text."""
    run, other = found[0], "likelihood" if ROWS[name].judge else "judge"
    signs = {
        "the other judge": -sign(run["wins"][other], 0.5),
        "the likelihood of held-out text": sign(run["nll_change"]),
    }
    return [what for what, worse in signs.items() if worse > 0]


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Left win rates by both judges, right how often rollouts were chosen."""
    figure = Figure(figsize=(10.0, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    names = list(found["rows"])
    for shift, judge, colour in ((0.17, "likelihood", "#0b6bbf"), (-0.17, "judge", "#c8541b")):
        shares = [over_runs(found["rows"][name], lambda run: run["wins"][judge]) for name in names]  # noqa: B023
        values = [each["value"] for each in shares]
        around = [[e["value"] - e["low"] for e in shares], [e["high"] - e["value"] for e in shares]]
        places = [len(names) - place + shift for place in range(len(names))]
        left.errorbar(values, places, xerr=np.maximum(around, 0), fmt="o", color=colour, capsize=2, label=f"by {judge}")
    left.set_yticks([len(names) - place for place in range(len(names))], [_told(name) for name in names], fontsize=8)
    left.axvline(0.5, color="#59636e", linewidth=0.8, linestyle="--")
    left.set(xlabel="win rate over the initial policy", xlim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    for name, colour in zip(("dpo-1", "dpo-4", "dpo-8"), ("#9aa4ad", "#0b6bbf", "#2f8f4e"), strict=True):
        if name not in found["rows"]:
            continue
        curves = found["rows"][name][0]["curves"]
        for metric, style, label in (("chosen_rate/rollout", "-", _told(name)), ("chosen_chance/rollout", ":", None)):
            rates = np.array(curves[metric], float)
            right.plot(np.arange(len(rates)) + 1, rates, style, color=colour, label=label, linewidth=1.2)
    right.set(xlabel="optimizer step", ylabel="a rollout is chosen (dotted: chance)", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def over_runs(found: Sequence[Mapping[str, Any]], read: Any) -> Estimate:
    """An estimate of each run: of a single one that with its interval over documents, of several the mean over seeds."""
    estimates = [read(run) for run in found]
    return estimates[0] if len(estimates) == 1 else over_seeds([each["value"] for each in estimates])


def _told(name: str) -> str:
    return ROWS[name].told + (" *" if ROWS[name].judge else "")


def section(found: Mapping[str, Any]) -> str:
    """Tables, claims, and what they do not show."""
    rows, start = found["rows"], found["initial"]
    seeds = len(rows[MAIN])
    told = paragraph(
        f"SmolLM2-135M-Instruct is continued on Wikipedia leads for {found['steps']} steps of 8 prefixes of up to 44",
        "tokens and suffixes of 20, in each of these ways. The frozen initial model is the teacher, whose likelihood judges;",
        f"rows with * learn from the judge of the first study. Rows with {seeds} seeds have intervals over seeds, the",
        "others over documents (95%). All continue the same held-out prefixes; win rates in percent are over the initial",
        "policy, sampled at T=1 as in training, and greedily; NLL (nats a token) is of the held-out text's own suffixes, less",
        "that by the initial policy; s is the training's seconds. All have one learning rate, chosen for none of them.",
        tokens_told(rows),
    )
    parts_of_it = [
        told,
        table(
            ["objective", "seeds", "win, likelihood", "win, judge", "win, judge, greedy", "NLL change", *OTHERS, "s"],
            [_initial_row(start), *(_row(name, runs_of) for name, runs_of in rows.items())],
        ),
        paragraph(
            f"The initial policy itself, sampled at 0.7 of the temperature, wins {percent(found['control'])} by likelihood:",
            "a policy that only became surer of itself would win as much.",
        ),
        f"### Does it work? {_told(MAIN)} against next-token training\n\n{claims_told(found['claims'], seeds)}",
        own_judge_told(rows),
        hacking_told(found["hacked"], rows),
    ]
    parts_of_it.append(
        paragraph(
            "What this does not show: anything about models of use. The judges are small (the likelihood favours what is",
            "plain, the other one knows shuffled words), the steps few; all win rates are against one draw of the initial",
            "policy's continuations, and an interval over seeds is of as many runs as there are seeds.",
        )
    )
    return "\n\n".join(parts_of_it)


def tokens_told(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How many tokens the two ways of next-token training learn from."""
    learnt = [rows[name][0]["tokens"] for name in (BASELINE, WHOLE) if "tokens" in rows.get(name, [{}])[0]]
    if len(learnt) < 2:
        return "A row learns from the tokens that its objective has: on whole pieces more than twice those of suffixes."
    suffixes, pieces = learnt
    return f"Whole pieces are learnt in fewer, smaller steps: {pieces:,} tokens, as of suffixes {suffixes:,}."


OTHERS = ("repetition", "repetition, greedy", "distinct-3", "distinct-3, greedy")


def _initial_row(start: Mapping[str, Any]) -> list[str]:
    return ["initial", "", "", "", "", f"of {start['nll']['value']:.3f}", *_others(start), ""]


def _others(run: Mapping[str, Any]) -> list[str]:
    return [f"{run[f'{kind}_{name}']:.3f}" for kind in DIVERSITY for name in ("sampled", "greedy")]


def _row(name: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    wins = [percent(over_runs(found, lambda run: run["wins"][judge]), digits) for judge, digits in WINS_DIGITS.items()]  # noqa: B023
    nll = decimal(over_runs(found, lambda run: run["nll_change"]))
    means = {key: float(np.mean([run[key] for run in found])) for key in found[0] if isinstance(found[0][key], float)}
    return [_told(name), str(len(found)), *wins, nll, *_others(means), f"{means['seconds']:.0f}"]


def claims_told(found: Mapping[str, Estimate], seeds: int) -> str:
    """Each claim with its interval and whether it holds, and how many do."""
    words = {1: "holds", 0: "not shown", -1: "the opposite"}
    lines = [[name, decimal(each), words[sign(each)]] for name, each in found.items()]
    held = sum(sign(each) > 0 for each in found.values())
    enough = "two thirds or more" if 3 * held >= 2 * len(found) else "fewer than two thirds"
    return "\n\n".join(
        [
            table([f"the method, mean over {seeds} seeds", "difference (95%)", ""], lines),
            "Intervals are over seeds and over the held-out documents, but for the last claim, which is over seeds.",
            f"{held} of {len(found)} claims hold with an interval that excludes zero: {enough}.",
        ]
    )


def own_judge_told(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What the rows of the trained judge win by that judge."""
    words = {1: "more than the initial policy's", 0: "no difference shown", -1: "less than the initial policy's"}
    wins = {name: found[0]["wins"]["judge"] for name, found in rows.items() if ROWS[name].judge}
    told = "; ".join(f"{_told(name)}: {percent(win, 1)} percent, {words[sign(win, 0.5)]}" for name, win in wins.items())
    return paragraph(f"How often the trained judge prefers sampled continuations of the rows that it trained: {told}.")


def hacking_told(names: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Which rows please their judge at the cost of what it did not look at, and of which."""
    if not names:
        return "Reward hacking: in no row is the training judge won while the other judge, or held-out likelihood, is lost."
    by_loss: dict[str, list[str]] = {}
    for name in names:
        for what in lost(name, rows[name]):
            by_loss.setdefault(what, []).append(_told(name))
    told = " ".join(f"Lost is {what} in: {'; '.join(of_it)}." for what, of_it in by_loss.items())
    return paragraph(
        f"Reward hacking, where the training judge is won and something else lost, by intervals over documents. {told}"
    )


STUDY = Study(
    name=NAME,
    question="What does each objective buy, and by whose judgement?",
    minutes=155,
    parts=parts,
    report=report,
    draw=draw,
    section=section,
    needs={"judge": (TRAINING, LEADS)},
)
