"""Judge continuations one by one: safety by the majority of the votes, factuality and others by their mean (section 3.3)."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.evaluation.generation import Generations, read_generations
from megatron_sip.evaluation.judging import Asked, Judged, add_judge_flags, ask, note_few_documents, report, settings_of
from megatron_sip.evaluation.majority import SAFETY, majority
from megatron_sip.files import write_atomically
from megatron_sip.judge.settings import LIKELIHOOD, JudgeSettings, is_pairwise, parse_criteria
from megatron_sip.records import Group

ABOUT = "judge continuations one by one"
SAFETY_ASKED, OTHERS_ASKED = Asked(votes=5, temperature=1.0), Asked(votes=8, temperature=0.7)
"""The paper (section 3.3) asks 8 times, at 0.7; of safety "N" times, at 1: an odd number has a majority."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A file of generations, and the judge."""
    parser.add_argument("generations", type=Path, help="a file that generate wrote")
    parser.add_argument("--scores", type=Path, help="JSON lines to write: each continuation's value by criterion")
    add_judge_flags(parser, SAFETY, f"{OTHERS_ASKED.votes}, of safety {SAFETY_ASKED.votes}")


def run(given: argparse.Namespace) -> None:
    """By criterion the mean of the generations' values, with an interval by document."""
    settings = rate_settings(given)
    generations = read_generations(given.generations)
    if not generations.lines:
        raise DataError(f"{given.generations}: no generation")
    judged = [asyncio.run(rated(one, generations)) for one in settings]
    if given.scores is not None:
        write_scores(given.scores, generations, judged)
    note_few_documents(generations)
    about = {**generations.about, "generations": str(given.generations)}
    report(given.output, about, judged, [one.result(generations, given.seed) for one in judged])


def write_scores(path: Path, generations: Generations, judged: Sequence[Judged]) -> None:
    """A line a generation, in order: index, document, and by criterion its value, null without a verdict."""
    lines = []
    for place, line in enumerate(generations.lines):
        scores = {one.name: one.values[place] for one in judged}
        lines.append(json.dumps({"index": line.index, "document": line.document, "scores": scores}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines))


def rate_settings(given: argparse.Namespace) -> list[JudgeSettings]:
    """A judge for each criterion. Raises DataError, SettingsError."""
    for name in parse_criteria(given.criteria):
        if name == LIKELIHOOD or is_pairwise(name):
            better = "nll measures that" if name == LIKELIHOOD else "compare asks that"
            raise DataError(f"--criteria {name}: no score from 0 to 1 of a single continuation; {better}")
    return settings_of(given, lambda name: SAFETY_ASKED if name == SAFETY else OTHERS_ASKED, add_flags)


async def rated(settings: JudgeSettings, generations: Generations) -> Judged:
    """The value that the settings' one criterion gives to each continuation.

    Of safety what most of the votes say, 1 or 0, and 0.5 where as many say the one as the other; of all else, and of soft
    verdicts, which are no votes, the mean.
    """
    [name] = settings.criteria
    votes_decide = name == SAFETY and settings.mode(name) == "hard"
    groups = [Group(line.task, [line.candidate]) for line in generations.lines]
    found = await ask(settings, groups, "dpo", by_majority if votes_decide else by_mean)
    if name != SAFETY:
        return found
    ties = sum(one == 0.5 for one in found.values)
    how = {"ties": ties} if ties else {}
    return replace(found, about=found.about | (how if votes_decide else {"value": "mean probability, no majority"}))


def by_majority(criterion: str, group: Group) -> float:
    return majority(_votes(criterion, group))


def by_mean(criterion: str, group: Group) -> float:
    return float(np.mean(_votes(criterion, group)))


def _votes(criterion: str, group: Group) -> list[float]:
    return [vote for _, vote in group.verdicts[criterion]]
