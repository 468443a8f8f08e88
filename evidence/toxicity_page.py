"""The figure and the text of the study of toxicity, from its report alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evidence.numbers import over_seeds
from evidence.study import paragraph, table
from evidence.toxicity_report import DPO, INITIAL, JUDGES, LIKELIHOODS, OPTIMISED, SAFEST, TEXTS

HELD_OUT = {"unlisted": "LDNOOBW", "mildness": "severity list", "not_abusive": "hatesonar"}
TRAINED_BY = "alt-profanity-check"
CLASSIFIERS = {"not_abusive": "hatesonar, mean", OPTIMISED: f"{TRAINED_BY}, mean"}
NAMED = {"pages": "clean pages", "leads": "Wikipedia leads"}
COLOURS = ("#8c959f", "#c8541b", "#d4a72c", "#0b6bbf")
BAR = 0.8 / len(COLOURS)


def draw(found: Mapping[str, Any], png: Path) -> None:
    """Toxicity of the continuations of toxic prompts by judge and arm; and what clean text lost of its likelihood."""
    found = widened(found)
    figure = Figure(figsize=(9.0, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.4))
    for number, ((arm, one), colour) in enumerate(zip(found["arms"].items(), COLOURS, strict=True)):
        places = np.arange(len(JUDGES)) + number * BAR
        _bars(left, places, [one["prompts"][judge] for judge in JUDGES], ("value", "interval"), colour, arm)
        if arm != INITIAL:
            lost = [one["nll"][text] for text in LIKELIHOODS]
            _bars(right, np.arange(len(lost)) + number * BAR, lost, ("change", "change_interval"), colour, arm)
    left.set_xticks(np.arange(len(JUDGES)) + 1.5 * BAR, [*HELD_OUT.values(), f"{TRAINED_BY}\n(DPO's criterion)"])
    left.set_ylabel("share, or mean probability, of toxicity\nbehind toxic prompts")
    left.legend(frameon=False, fontsize=8)
    right.set_xticks(np.arange(len(LIKELIHOODS)) + 2 * BAR, list(NAMED.values()))
    right.axhline(0, color="#59636e", linewidth=0.8)
    right.set_ylabel("change of nats a token")
    figure.savefig(png)


def _bars(
    axis: Any, places: Any, values: Sequence[Mapping[str, Any]], names: tuple[str, str], colour: str, arm: str
) -> None:
    """names: of a value and of its interval."""
    heights = np.array([one[names[0]] for one in values])
    spans = np.abs(np.array([one[names[1]] for one in values]).T - heights)
    axis.bar(places, heights, BAR, yerr=spans, color=colour, label=arm, error_kw={"linewidth": 0.8})


def widened(found: Mapping[str, Any]) -> dict[str, Any]:
    """The report with DPO's intervals by Student's over its seeds beside those over the items, in quadrature: a bootstrap of
    three seeds is too narrow. The arms that it is compared with are one run each."""
    dpo = found["arms"][DPO]
    arm = {**dpo, **{text: _widened(dpo[text], dpo[text]) for text in (*TEXTS, "nll")}}
    arm["lambada"] = _widened({"": dpo["lambada"]}, {"": dpo["lambada"]})[""]
    arm["diversity"] = {text: _widened(one, one) for text, one in dpo["diversity"].items()}
    against = {
        other: {text: _widened(each, dpo[text]) for text, each in one.items()}
        for other, one in found["against"].items()
    }
    return {**found, "arms": {**found["arms"], DPO: arm}, "against": against}


def _widened(found: Mapping[str, Any], seeds: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    for name, one in found.items():
        over = over_seeds(seeds[name]["by_seed"])
        half = over.get("high", over["value"]) - over["value"]
        made[name] = dict(one)
        for centre, ends in (("value", "interval"), ("change", "change_interval")):
            if one.get(ends):
                low, high = (
                    one[centre] + way * np.hypot(end - one[centre], half)
                    for way, end in zip((-1, 1), one[ends], strict=True)
                )
                made[name][ends] = [float(low), float(high)]
    return made


def section(found: Mapping[str, Any]) -> str:
    """Markdown of a report."""
    found = widened(found)
    size = found["settings"]
    prompts = 700 if size["prompts"] is None else size["prompts"]
    rate, chance = (np.mean(found["curve"][f"chosen_{name}/rollout"]) for name in ("rate", "chance"))
    blocks = [
        setting(found),
        f"Behind {prompts} RealToxicityPrompts, {size['rollouts']} continuations of 20 tokens each at temperature 1. Two word "
        f"lists (LDNOOBW; severities up to 100) and another classifier were not trained by, {TRAINED_BY} was; both classifiers "
        "learnt from the same labelled tweets, among others, so that hatesonar is less apart than the lists. Lists give the "
        "share of continuations, classifiers their mean probability. In brackets the change from the initial model with its "
        "95% interval over prompts, of DPO widened by Student's over its few seeds; less is better:",
        toxicity_table(found, "prompts"),
        "DPO against the other two arms, prompt by prompt; these are one run each, and what another run of them would give is "
        "in no interval:",
        against_table(found),
        f"Behind {size['prefixes']} prefixes of held-out clean pages, where nothing should get worse:",
        toxicity_table(found, "clean"),
        "What it cost on clean text that no arm learnt from, and how varied the continuations of the toxic prompts are:",
        price_table(found),
        told(found["arms"][DPO]),
        "What it does not show: safety; what another learning rate than the one of all arms would do. What cooler sampling "
        "alone does is a study of its own.",
        f"A rollout, not the page's suffix, was chosen in {100 * rate:.0f}% of DPO's groups, by chance {100 * chance:.0f}%.",
    ]  # fmt: skip
    return "\n\n".join(block if block.startswith("|") else paragraph(block) for block in blocks)


def setting(found: Mapping[str, Any]) -> str:
    """What was trained on what."""
    train, safest, seeds = found["text"]["train"], found["text"]["safest"], len(found["seeds"])
    if SAFEST in found["against"]:
        filtered = (
            f"The {SAFEST} are those of the safer half of pieces, by {TRAINED_BY}, {safest['clean']} of clean and "
            f"{safest['offensive']} of offensive pages, each behind a prefix of 44 tokens."
        )
        whole = "next token learns whole pieces, so two to three times the tokens"
    else:
        filtered = f"The safest half, by {TRAINED_BY}, holds {safest['offensive']} of the offensive ones."
        whole = "the other arms learn whole pieces, not suffixes alone"
    return (
        f"{found['settings']['steps']} steps of 8 prefixes on {train['offensive']} pages of offensive and {train['clean']} "
        f"of clean sayings (`tools/fetch_toxicity.py`). {filtered} DPO takes the best and the worst of a suffix and 4 "
        f"rollouts: one minus the probability of {TRAINED_BY} counts twice, the likelihood by the initial model, a cheap "
        f"stand-in for quality, once; it is the mean of {seeds} seed{'s' * (seeds > 1)}, the other arms are one run each; "
        f"{whole}. This is toxicity, words of profanity and abuse, not safety in general."
    )


def toxicity_table(found: Mapping[str, Any], text: str) -> str:
    """All judges of the continuations of one of TEXTS, in percent."""
    repeated = f"in one of {found['settings']['rollouts']}"
    heads = {
        "unlisted": "a listed word",
        "any": repeated,
        "mildness": "severity",
        **CLASSIFIERS,
    }
    rows = [[arm, *(percent_change(one[text][name]) for name in heads)] for arm, one in found["arms"].items()]
    return table(["%", *heads.values()], rows)


def against_table(found: Mapping[str, Any]) -> str:
    """DPO less the arms that learn by the next token: toxicity in percentage points, nats a token."""
    heads = {"unlisted": "a listed word", "mildness": "severity", **CLASSIFIERS}
    rows = [
        [
            f"DPO less {arm}",
            *("{} ({} to {})".format(*_written(one["prompts"][name], 100, "{:+.1f}")) for name in heads),
            *("{} ({} to {})".format(*_written(one["nll"][text], 1, "{:+.3f}")) for text in LIKELIHOODS),
        ]
        for arm, one in found["against"].items()
    ]
    return table(["", *heads.values(), *(f"nats, {name}" for name in NAMED.values())], rows)


def price_table(found: Mapping[str, Any]) -> str:
    """Likelihood, LAMBADA and variety of all arms."""
    head = [*(f"nats a token, {name}" for name in NAMED.values()), "LAMBADA, %", "distinct-2", "repetition, %", "words"]
    rows = []
    for arm, one in found["arms"].items():
        varied = one["diversity"]["prompts"]
        rows.append([
            arm,
            *(_changed(one["nll"][text], 1, "{:.3f}", "{:+.3f}") for text in LIKELIHOODS),
            _changed(one["lambada"], 100, "{:.1f}", "{:+.1f}"),
            _changed(varied["distinct_2"], 1, "{:.3f}", "{:+.3f}"),
            f"{100 * varied['repetition']['value']:.2f}",
            f"{one['words']['prompts']:.1f}",
        ])  # fmt: skip
    return table(["arm", *head], rows)


def told(dpo: Mapping[str, Any]) -> str:
    """What the intervals of DPO's changes say, in words."""
    lines = []
    for text, where in zip(TEXTS, ("toxic prompts", "clean prefixes"), strict=True):
        others = "; ".join(f"{name}: {direction(dpo[text][judge])}" for judge, name in HELD_OUT.items())
        own = direction(dpo[text][OPTIMISED])
        lines.append(f"DPO behind {where}, by what it was not trained by: {others}; by its criterion: {own}.")
    cost = "; ".join(f"{name}: {direction(dpo['nll'][text])}" for text, name in NAMED.items())
    kept = {"LAMBADA": dpo["lambada"], "distinct-2 behind toxic prompts": dpo["diversity"]["prompts"]["distinct_2"]}
    rest = "; ".join(f"{name}: {direction(one)}" for name, one in kept.items() if "change" in one)
    bland = (
        f"What else bland text would lose: {rest}." if rest else "LAMBADA's and distinct-2's changes have no interval."
    )
    return " ".join([*lines, f"Its nats a token: {cost}.", bland])


def direction(one: Mapping[str, Any]) -> str:
    """What the interval of a change says."""
    low, high = one["change_interval"]
    return "less" if high < 0 else "more" if low > 0 else "no difference that the interval shows"


def percent_change(one: Mapping[str, Any]) -> str:
    """A share, and in brackets its change, in percent."""
    return _changed(one, 100, "{:.1f}", "{:+.1f}")


def _changed(one: Mapping[str, Any], scale: float, plain: str, signed: str) -> str:
    """The value, and in brackets its change with the interval, where there is one."""
    value = plain.format(scale * one["value"])
    if "change" not in one:
        return value
    return "{} ({}, {} to {})".format(value, *_written(one, scale, signed))


def _written(one: Mapping[str, Any], scale: float, signed: str) -> list[str]:
    """A change and the ends of its interval."""
    return [signed.format(scale * number) for number in (one["change"], *one["change_interval"])]
