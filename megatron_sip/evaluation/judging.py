"""Numbers that a judge gives about files of generations: `compare` and `rate` ask, and count what they are told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_sip.config import flags
from megatron_sip.config.needs import has_served_criteria
from megatron_sip.config.teacher_settings import judge_settings
from megatron_sip.config.unused_flags import refuse_unused
from megatron_sip.console import bars
from megatron_sip.errors import DataError, UserError
from megatron_sip.evaluation.generation import ENDED, Generations
from megatron_sip.evaluation.results import Result, write_results
from megatron_sip.evaluation.win_rate import FEW_DOCUMENTS, interval
from megatron_sip.judge import Judge
from megatron_sip.judge.settings import (
    LABELLED_CRITERIA,
    LIKELIHOOD,
    JudgeSettings,
    Objective,
    VerdictMode,
    asks_server,
    function_of,
    is_pairwise,
    parse_criteria,
    parse_verdicts,
)
from megatron_sip.records import Group

MEASURES = {"factscore": "factuality", "halueval": "factuality"}
"""Names of measures that are not the criterion's own."""
SAMPLING_FLAGS = ("--judge-votes", "--judge-temperature", "--judge-top-p", "--judge-max-tokens")
JUDGE_FLAGS = (
    *("--criteria", "--criteria-timeout", "--criteria-processes", "--judge-verdict", *SAMPLING_FLAGS, "--judge-quorum"),
    *("--judge-deadline", "--judge-concurrency", "--judge-cache"),
)
"""Of the trainer's: a schedule has nothing to choose of a pair, nor of single texts."""


class JudgingError(UserError, RuntimeError):
    """The judge gave no verdict that could be used; the message says what to look at."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Verdicts that are asked for about a pair, half in each order, or a text; and their sampling."""

    votes: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Judged:
    """What one criterion said. name: the criterion's. values: one for each generation, None where there is no verdict.

    about: how it was asked and what came back, for the file of results.
    """

    name: str
    values: list[float | None]
    about: dict[str, Any]

    def result(self, generations: Generations, seed: int) -> Result:
        """The mean over what was judged, with its interval by document. Raises JudgingError when nothing was."""
        known = [
            (value, line.document)
            for value, line in zip(self.values, generations.lines, strict=True)
            if value is not None
        ]
        if not known:
            raise JudgingError(
                f"--criteria {self.name}: none of {len(self.values)} generations got a verdict: {self.about}"
            )
        outcomes, documents = np.array([value for value, _ in known]), [document for _, document in known]
        dataset, failed = generations.header.get("dataset", "documents"), len(self.values) - len(known)
        found = interval(outcomes, documents, seed)
        return Result(measure_of(self.name), dataset, float(outcomes.mean()), len(known), found, failed)


def measure_of(criterion: str) -> str:
    """The measure that a criterion gives: factuality of factuality:v4, else mostly its own name."""
    name = criterion.partition(":")[0] if criterion.startswith("factuality") else criterion
    return MEASURES.get(name, name)


def add_judge_flags(parser: argparse.ArgumentParser, criteria: str, defaults: str) -> None:
    """Of the judge, as the trainer takes them, those that act on single texts and pairs.

    defaults: of --judge-votes, for --help. --judge-votes and --judge-temperature are up to `settings_of`.
    """
    parser.add_argument("--output", type=Path, help="file of results; the judge's answers are kept beside it")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws and of the interval's resampling")
    flags.add_teacher_flags(parser.add_argument_group("the judge's servers, as the trainer takes them"))
    own: flags.Flags = {name: flags.JUDGE_FLAGS[name] for name in JUDGE_FLAGS}
    own["--judge-votes"] = ({"type": int}, f"Verdicts that the judge writes. Default: {defaults}.")
    own["--judge-temperature"] = ({"type": float}, "Sampling of verdicts. Default: the paper's (section 3.3).")
    flags.add_flags(parser.add_argument_group("the judge, as the trainer takes it"), own)
    everything = argparse.ArgumentParser()
    flags.add_flags(everything, {name: how for name, how in flags.JUDGE_FLAGS.items() if name not in JUDGE_FLAGS})
    parser.set_defaults(**vars(everything.parse_args([])))
    parser.set_defaults(criteria=[criteria], judge_verdict=["hard"], judge_top_p=1.0, judge_audit_rate=0.0)
    parser.set_defaults(judge_deadline=24 * 3600.0, tasks="documents", teacher_model=None)


def settings_of(
    given: argparse.Namespace, asked: Callable[[str], Asked], add: Callable[[argparse.ArgumentParser], None]
) -> list[JudgeSettings]:
    """Those of a judge for each criterion. asked: votes and temperature by criterion, unless the flags say; add: the flags.

    Raises DataError for criteria that cannot be asked about continuations, or not together, and for flags that would do
    nothing; SettingsError.
    """
    weights = parse_criteria(given.criteria)
    modes = _modes(given, weights)
    _check_criteria(given, weights)
    written = [name for name in weights if asks_server(name) and name != LIKELIHOOD and modes[name] == "hard"]
    if not has_served_criteria(given):
        refuse_unused(given, add, ("--teacher-url", "--judge-verdict"), "with Python functions alone")
    elif not given.teacher_url:
        raise DataError(f"{given.command} needs --teacher-url, the judge's servers")
    if not written:
        refuse_unused(given, add, SAMPLING_FLAGS, "where no verdict is written")
    if all(function_of(name) is None for name in weights):
        refuse_unused(given, add, ("--criteria-timeout", "--criteria-processes"), "without a Python function")
    kept = given.output.with_name(given.output.name + ".answers.sqlite") if given.output else None
    settings = []
    for name in weights:
        usual = asked(name)
        own = vars(given) | {"criteria": [name], "judge_verdict": [modes[name]]}
        own["judge_cache"] = given.judge_cache or kept
        own["judge_votes"] = usual.votes if given.judge_votes is None else given.judge_votes
        own["judge_temperature"] = usual.temperature if given.judge_temperature is None else given.judge_temperature
        settings.append(judge_settings(argparse.Namespace(**own)))
    return settings


def _modes(given: argparse.Namespace, names: Collection[str]) -> dict[str, VerdictMode]:
    """Whether the verdicts of each criterion are read (hard, unless told) or their probabilities (soft)."""
    named_all = any("=" not in item for item in given.judge_verdict)
    default, own = parse_verdicts(given.judge_verdict if named_all else ["hard", *given.judge_verdict])
    if unknown := sorted(own.keys() - set(names)):
        raise DataError(f"--judge-verdict {unknown[0]}={own[unknown[0]]}: --criteria names {', '.join(names)}")
    return {name: own.get(name, default) for name in names}


def _check_criteria(given: argparse.Namespace, weights: Mapping[str, float]) -> None:
    measures: dict[str, str] = {}
    for name, weight in weights.items():
        if name in LABELLED_CRITERIA:
            raise DataError(
                f"--criteria {name}: it scores answers to --tasks {LABELLED_CRITERIA[name]}, not continuations"
            )
        if weight != 1:
            raise DataError(
                f"--criteria {name}={weight:g}: each criterion is a number of its own: leave the weight out"
            )
        other = measures.setdefault(measure_of(name), name)
        if other != name:
            raise DataError(
                f"--criteria {other} {name}: both are results called {measure_of(name)}: give {given.command} one at a time, "
                "each with an --output of its own"
            )


async def ask(
    settings: JudgeSettings, groups: Sequence[Group], objective: Objective, read: Callable[[str, Group], float | None]
) -> Judged:
    """Have the groups judged by the settings' one criterion; `read` makes a value of each that has scores."""
    async with Judge(settings, document_end=ENDED) as judge:
        await judge.check()
        [name] = judge.weights
        with tqdm(total=len(groups), desc=name, unit="prefix", file=bars()) as bar:
            judged = await judge.score(groups, objective=objective, progress=bar.update)
        values = [None if group.scores is None else read(name, group) for group in judged]
        return Judged(name, values, how_asked(settings, name, judge.model) | told(judge.counters(), name))


def how_asked(settings: JudgeSettings, criterion: str, model: str | None) -> dict[str, Any]:
    """The judge and its sampling."""
    if model is None:
        return {"criterion": criterion}
    [setting] = settings.criteria
    asked = {"criterion": criterion, "judge": model, "verdicts": settings.mode(setting)}
    orders = {"in each order": settings.votes // 2} if is_pairwise(setting) else {}
    sampling = {"votes": settings.votes, **orders, "temperature": settings.temperature, "top_p": settings.top_p}
    return asked | (sampling if asked["verdicts"] == "hard" else {})


def told(counters: Mapping[str, float], criterion: str) -> dict[str, float]:
    """What came back: judgements, those that are missing and why, how much the place decides, prefixes cut to fit."""
    shown = {f"verdicts/{criterion}": "judgements", f"verdicts-missing/{criterion}": "judgements missing"}
    first = f"first-shown-preferred/{criterion}"  # a share, of which 0 says as much as 1
    shown |= {first: "first shown preferred"}
    shown |= {"cached": "answers kept from before", "prefixes-cut": "prefixes cut"}
    reasons = ("groups/dropped/", "unreadable/", "failed/")
    shown |= {name: name.removeprefix("groups/") for name in counters if name.startswith(reasons)}
    return {
        word: round(counters[name], 4)
        for name, word in shown.items()
        if counters.get(name) or name == first in counters
    }


def report(output: Path | None, about: Mapping[str, Any], judged: Sequence[Judged], results: Sequence[Result]) -> None:
    """Print the results, a line each, and write them where `output` says."""
    for one, result in zip(judged, results, strict=True):
        low, high = result.interval or (result.value, result.value)
        left = f", {result.failed} without a verdict" if result.failed else ""
        print(
            f"{result.measure}/{result.dataset}: {100 * result.value:.1f} (95% {100 * low:.1f} to {100 * high:.1f}), "
            f"{result.samples} generations{left}"
        )
        print("   " + ", ".join(f"{name} {value}" for name, value in one.about.items()))
    if output is not None:
        write_results(output, {**about, "judged": [one.about for one in judged]}, results)


def note_few_documents(generations: Generations) -> None:
    """Say so where an interval covers next to nothing."""
    if (count := len({line.document for line in generations.lines})) < FEW_DOCUMENTS:
        print(f"{count} documents say little: {FEW_DOCUMENTS} or more are needed")
