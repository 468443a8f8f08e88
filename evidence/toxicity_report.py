"""What the study of toxicity found: its parts' files as a report of numbers, without texts and paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evidence.study import Place, Report, StudyError
from evidence.toxicity_text import MANIFEST
from megatron_sip.evaluation.diversity import ngrams, words_of
from megatron_sip.evaluation.generation import read_generations
from megatron_sip.evaluation.plots import series
from megatron_sip.evaluation.results import Result, read_results
from megatron_sip.files import read_json, read_json_lines
from megatron_sip.training.metrics_writer import read_metrics

INITIAL, NEXT_TOKEN, SAFEST, DPO = "initial", "next token", "safest suffixes", "DPO"
OPTIMISED = "civility"
JUDGES = {
    "unlisted": "a listed word",
    "mildness": "severity",
    "not_abusive": "hatesonar",
    OPTIMISED: "alt-profanity-check",
}
"""Criteria of evidence/criteria.py, and what one minus their number is called; the one that was trained by stands last."""
CRITERIA = tuple(f"evidence.criteria:{name}" for name in JUDGES)
TEXTS = ("prompts", "clean")
"""Whose continuations are judged: toxic prompts, and held-out clean pages."""
LIKELIHOODS = ("pages", "leads")
"""Held-out clean text whose likelihood is measured: of the same source as the training text, and of another."""
RESAMPLES = 2_000
HALVES = 200
"""Random halves of the prompts, for what is no mean over them."""

Floats = NDArray[np.float64]


def interval(values: Floats, weights: Floats, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of the weighted mean of values [seeds, items]; weights [items].

    Both seeds and items are drawn anew: with one seed it covers the items alone, with three it is narrower than what another
    run would give.
    """
    rng = np.random.default_rng(seed)
    seeds, items = values.shape
    means = np.empty(RESAMPLES)
    for place in range(RESAMPLES):
        drawn = np.bincount(rng.integers(items, size=items), minlength=items) * weights
        runs = values[rng.integers(seeds, size=seeds)] if seeds > 1 else values
        means[place] = (runs @ drawn).mean() / drawn.sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compared(values: Floats, initial: Floats, weights: Floats | None = None) -> Report:
    """Mean of values [seeds, items] and its change from the initial model's [1, items], with intervals; means by seed."""
    weights = np.ones(values.shape[1]) if weights is None else weights
    means = np.average(values, axis=1, weights=weights)
    report: Report = {"value": float(means.mean()), "interval": interval(values, weights)}
    if values is not initial:
        change = values - initial
        report |= {"change": float(np.average(change, axis=1, weights=weights).mean())}
        report |= {"change_interval": interval(change, weights), "by_seed": means.tolist()}
    return rounded(report)


def rounded(value: Any) -> Any:
    """The same with floats of four places."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def toxicity(path: Path, criterion: str) -> dict[str, list[float]]:
    """By prompt one minus the numbers of its continuations, of a file of `rate --scores`. Raises StudyError: one is missing."""
    found: dict[str, list[float]] = {}
    for line in read_json_lines(path, "scores"):
        score = line["scores"][criterion]
        if score is None:
            raise StudyError(f"{path}: {criterion} has no number for generation {line['index']}: remove the file")
        found.setdefault(line["document"], []).append(1.0 - score)
    return found


def by_prompt(folders: Sequence[Path], text: str, criterion: str, reduce: Any = np.mean) -> Floats:
    """[folders, prompts] `reduce` over a prompt's continuations, prompts in one order."""
    files = [toxicity(folder / f"{text}.scores.jsonl", criterion) for folder in folders]
    if any(file.keys() != files[0].keys() for file in files):
        raise StudyError(f"{folders[0]}: {text} has other prompts than the other seeds'")
    return np.array([[reduce(file[prompt]) for prompt in sorted(files[0])] for file in files])


def nats(folders: Sequence[Path], text: str) -> tuple[Floats, Floats]:
    """([folders, documents] nats a token, [documents] tokens) of a file that `nll` grew, each line a piece of a document."""
    files = [read_json_lines(folder / f"{text}.nll.json.document.jsonl", "log-likelihoods")[1:] for folder in folders]
    names = [line["document"] for line in files[0]]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    own = [places[name] for name in names]
    tokens: Floats = np.bincount(own, weights=[float(line["tokens"]) for line in files[0]]).astype(np.float64)
    return np.array([np.bincount(own, weights=[line["nll"] for line in file]) / tokens for file in files]), tokens


def values_of(folders: Sequence[Path], file: str) -> dict[str, Report]:
    """By dataset the mean over folders of a file of results, each folder's own, and the interval where there is one folder."""
    found = [{result.dataset: result for result in read_results(folder / file).results} for folder in folders]
    return {name: _value([one[name] for one in found]) for name in found[0]}


def _value(results: Sequence[Result]) -> Report:
    values = [result.value for result in results]
    report: Report = {"value": float(np.mean(values)), "by_seed": values, "samples": results[0].samples}
    if len(results) == 1:
        report["interval"] = results[0].interval
    return rounded(report)


def arm_report(folders: Sequence[Path], initial: Sequence[Path]) -> Report:
    """All numbers of an arm, whose seeds lie in `folders`, beside the initial model's."""
    report: Report = {text: {} for text in TEXTS}
    same = list(folders) == list(initial)
    for text in TEXTS:
        for criterion, name in zip(CRITERIA, JUDGES, strict=True):
            base = by_prompt(initial, text, criterion)
            report[text][name] = compared(base if same else by_prompt(folders, text, criterion), base)
        base = by_prompt(initial, text, CRITERIA[0], max)
        report[text]["any"] = compared(base if same else by_prompt(folders, text, CRITERIA[0], max), base)
    report["nll"] = {}
    for text in LIKELIHOODS:
        base, tokens = nats(initial, text)
        report["nll"][text] = compared(base if same else nats(folders, text)[0], base, tokens)
    answers = passages([*initial, *folders])
    base = answers[:1]
    report["lambada"] = compared(base if same else answers[1:], base)
    report["diversity"] = {text: values_of(folders, f"{text}.diversity.json") for text in TEXTS}
    if not same:
        for text, found in report["diversity"].items():
            found["distinct_2"] |= distinct_change(folders, initial, text)
    report["words"] = {text: words(folders, text) for text in TEXTS}
    return report


def passages(folders: Sequence[Path]) -> Floats:
    """[folders, passages] 1 where LAMBADA's last word is right. Raises StudyError where the passages are not the same."""
    files = [read_json_lines(folder / "lambada.json.questions.jsonl", "answers") for folder in folders]
    asked = [[(line["question"], line["prompt_hash"]) for line in file] for file in files]
    if (other := next((place for place, one in enumerate(asked) if one != asked[0]), None)) is not None:
        raise StudyError(f"{folders[other]}: LAMBADA's passages are not those of {folders[0]}")
    return np.array([[float(line["acc"] > 0) for line in file] for file in files])


def distinct_change(folders: Sequence[Path], initial: Sequence[Path], text: str) -> Report:
    """How distinct-2 of all continuations differs from the initial model's, the mean over folders, with its 95% interval over
    prompts by the delete-half jackknife: a bootstrap's doubled texts are no new ones."""
    [before], after = ([pairs_by_prompt(folder / f"{text}.jsonl") for folder in which] for which in (initial, folders))
    prompts = sorted(before)

    def difference(chosen: Sequence[str]) -> float:
        first, *others = (distinct([file[prompt] for prompt in chosen]) for file in (before, *after))
        return float(np.mean(others)) - first

    rng = np.random.default_rng(0)
    halves = [rng.permutation(len(prompts))[: len(prompts) // 2] for _ in range(HALVES)]
    spread = 1.96 * float(np.std([difference([prompts[i] for i in half]) for half in halves]))
    change = difference(prompts)
    return rounded({"change": change, "change_interval": [change - spread, change + spread]})


def distinct(pairs: Sequence[Sequence[tuple[str, ...]]]) -> float:
    """Different ones per pair of words."""
    found = [pair for own in pairs for pair in own]
    return len(set(found)) / max(1, len(found))


def pairs_by_prompt(path: Path) -> dict[str, list[tuple[str, ...]]]:
    """By prompt the pairs of words of its continuations, of a file of `generate`."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for line in read_generations(path).lines:
        found.setdefault(line.document, []).extend(ngrams(words_of(line.text), 2))
    return found


def words(folders: Sequence[Path], text: str) -> float:
    """Mean words of a continuation: a text that ends early has less that can offend."""
    found = [read_results(folder / f"{text}.diversity.json").about["words"] for folder in folders]
    return round(float(np.mean(found)), 2)


def differences(folders: Sequence[Path], other: Sequence[Path]) -> Report:
    """How much more toxic, and how many more nats a token, an arm is than another one, prompt by prompt."""
    found: Report = {
        text: {
            name: change(by_prompt(folders, text, criterion), by_prompt(other, text, criterion))
            for criterion, name in zip(CRITERIA, JUDGES, strict=True)
        }
        for text in TEXTS
    }
    found["nll"] = {text: change(nats(folders, text)[0], *nats(other, text)) for text in LIKELIHOODS}
    return found


def change(values: Floats, other: Floats, weights: Floats | None = None) -> Report:
    """`compared` without the values themselves; `other` is of one seed, and weights of its items."""
    found = compared(values, other, weights)
    return {name: found[name] for name in ("change", "change_interval")}


def curve(run_dirs: Sequence[Path]) -> Report:
    """Of the DPO runs by step, as means over the seeds: how often a rollout was chosen and rejected, and by chance."""
    names = (
        "chosen_rate/rollout",
        "chosen_chance/rollout",
        "rejected_rate/rollout",
        "spread/evidence.criteria:civility",
    )
    found: Report = {}
    for name in names:
        values = [series(read_metrics(folder / "metrics.jsonl"), name) for folder in run_dirs]
        length = min(len(steps) for steps, _ in values)
        found[name] = np.mean([run[:length] for _, run in values], axis=0).tolist()
    return rounded(found)


def report_of(place: Place, folders: Mapping[str, Sequence[Path]], text: Path, settings: Mapping[str, Any]) -> Report:
    """folders: by arm its seeds' folders, with evaluations in them; text: of evidence/toxicity_text.py."""
    return {
        "settings": dict(settings),
        "text": read_json(text / MANIFEST, "counts of pages"),
        "seeds": list(place.seeds),
        "arms": {arm: arm_report(found, folders[INITIAL]) for arm, found in folders.items()},
        "against": {arm: differences(folders[DPO], folders[arm]) for arm in (NEXT_TOKEN, SAFEST)},
        "curve": curve(folders[DPO]),
    }
