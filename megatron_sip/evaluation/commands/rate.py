"""Judge continuations one by one: safety by the majority of the votes, factuality and others by their mean (section 3.3)."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.evaluation.generation import Generations, read_generations
from megatron_sip.evaluation.judging import Judged, add_judge_flags, ask, note_few_documents, report, settings_of
from megatron_sip.evaluation.majority import majority
from megatron_sip.judge.settings import LIKELIHOOD, JudgeSettings, is_pairwise, parse_criteria
from megatron_sip.records import Group

ABOUT = "judge continuations one by one"
JUDGEMENTS = 5
"""The paper does not say how many; an odd number of votes has a majority."""
SAFETY = "safety"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A file of generations, and the judge."""
    parser.add_argument("generations", type=Path, help="a file that generate wrote")
    add_judge_flags(parser, SAFETY, JUDGEMENTS)


def run(given: argparse.Namespace) -> None:
    """By criterion the mean of the generations' values, with an interval by document."""
    for name in parse_criteria(given.criteria):
        if name == LIKELIHOOD or is_pairwise(name):
            better = "nll measures that" if name == LIKELIHOOD else "compare asks that"
            raise DataError(f"--criteria {name}: no score from 0 to 1 of a single continuation; {better}")
    settings = list(settings_of(given, temperature))
    generations = read_generations(given.generations)
    if not generations.lines:
        raise DataError(f"{given.generations}: no generation")
    judged = [asyncio.run(rated(one, generations)) for one in settings]
    note_few_documents(generations)
    about = {**generations.about, "generations": str(given.generations)}
    report(given.output, about, judged, [one.result(generations, given.seed) for one in judged])


def temperature(criterion: str) -> float:
    """The paper's, of verdicts about single texts."""
    return 1.0 if criterion == SAFETY else 0.7


async def rated(settings: JudgeSettings, generations: Generations) -> Judged:
    """The value that the settings' one criterion gives to each continuation."""
    groups = [Group(line.task, [line.candidate]) for line in generations.lines]
    found = await ask(settings, groups, "dpo", value)
    if found.name != SAFETY:
        return found
    ties = sum(one == 0.5 for one in found.values)
    return Judged(found.name, found.values, found.about | ({"ties": ties} if ties else {}))


def value(criterion: str, group: Group) -> float:
    """Of safety what most of the votes say, 1 or 0, and 0.5 where as many say the one as the other; else the votes' mean."""
    votes = [vote for _, vote in group.verdicts[criterion]]
    return majority(votes) if criterion == SAFETY else float(np.mean(votes))
