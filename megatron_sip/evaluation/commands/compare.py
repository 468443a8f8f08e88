"""Judge one model's continuations against another's, by the paper's protocol (section 3.3)."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.evaluation.generation import Generations, read_generations
from megatron_sip.evaluation.judging import Asked, Judged, add_judge_flags, ask, note_few_documents, report, settings_of
from megatron_sip.evaluation.win_rate import preference
from megatron_sip.judge.settings import LABELLED_CRITERIA, LIKELIHOOD, JudgeSettings, is_pairwise, parse_criteria
from megatron_sip.records import Group

ABOUT = "judge one model's continuations against another's"
ASKED = Asked(votes=8, temperature=0.7)
"""Of the paper's comparisons (section 3.3): eight a pair, four in each order, and their mean."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Two files of generations, and the judge."""
    parser.add_argument("base", type=Path, help="generations of the model that is compared with")
    parser.add_argument("model", type=Path, help="generations of the model in question, of the same tasks")
    add_judge_flags(parser, "quality", f"{ASKED.votes}, half of them in each order")


def run(given: argparse.Namespace) -> None:
    """By criterion how far the judgements prefer the second model, with an interval by document."""
    settings = compare_settings(given)
    before, after = read_generations(given.base), read_generations(given.model)
    require_alike(given.base, before, given.model, after)
    judged = [asyncio.run(compared(one, before, after)) for one in settings]
    of_base = {"base": before.header.get("model"), "base generations": str(given.base)}
    note_few_documents(after)
    report(
        given.output,
        {**after.about, **of_base, "generations": str(given.model)},
        judged,
        [one.result(after, given.seed) for one in judged],
    )


def compare_settings(given: argparse.Namespace) -> list[JudgeSettings]:
    """A judge for each criterion. Raises DataError, SettingsError."""
    for name in parse_criteria(given.criteria):
        if name not in LABELLED_CRITERIA and name != LIKELIHOOD and not is_pairwise(name):
            raise DataError(f"--criteria {name}: it is asked about one continuation, not about two: `rate` does that")
    if given.judge_votes is not None and given.judge_votes % 2:
        raise DataError(f"--judge-votes {given.judge_votes}: half of them are asked in each order: give an even number")
    return settings_of(given, lambda _: ASKED, add_flags)


async def compared(settings: JudgeSettings, before: Generations, after: Generations) -> Judged:
    """How far the settings' one criterion prefers each continuation of `after` to that of the same task in `before`."""
    lines = zip(before.lines, after.lines, strict=True)
    groups = [Group(line.task, [base.candidate, line.candidate]) for base, line in lines]
    return await ask(settings, groups, "pair", preference)


def require_alike(base: Path, before: Generations, model: Path, after: Generations) -> None:
    """Raises DataError unless both files hold the same prefixes in the same order, sampled alike, and at least one."""
    for what, flags in (("dataset", "--dataset"), ("sampling", "--suffix-length, --temperature and --top-p")):
        one, other = before.header.get(what), after.header.get(what)
        if one != other:
            raise DataError(f"{base} has {what} {one}, {model} {other}: generate both with the same {flags}")
    if len(before.lines) != len(after.lines) or not after.lines:
        raise DataError(
            f"{base} holds {len(before.lines)} generations, {model} {len(after.lines)}: finish both with the same --samples"
        )
    for one, other in zip(before.lines, after.lines, strict=True):
        if (one.prefix, one.suffix) != (other.prefix, other.suffix):
            raise DataError(
                f"{base} and {model}: task {one.index} has another prefix in each; generate both with the same --data-path, "
                "--split, --subset, --part, --seed and lengths"
            )
