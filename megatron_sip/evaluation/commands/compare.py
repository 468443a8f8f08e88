"""Judge one model's continuations against another's, by the paper's protocol (section 3.3)."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path

from megatron_sip.config import flags
from megatron_sip.config.needs import has_served_criteria
from megatron_sip.config.teacher_settings import judge_settings
from megatron_sip.errors import DataError
from megatron_sip.evaluation.generation import ENDED, Generations, read_generations
from megatron_sip.evaluation.win_rate import WinRate, compare
from megatron_sip.files import write_atomically
from megatron_sip.judge import Judge
from megatron_sip.judge.settings import LABELLED_CRITERIA, JudgeSettings, parse_criteria

ABOUT = "judge one model's continuations against another's"
JUDGEMENTS, TEMPERATURE = 8, 0.7
"""Of the paper's comparisons (section 3.3): eight a pair, four in each order, and their mean."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Two files of generations, and the judge."""
    parser.add_argument("base", type=Path, help="generations of the model that is compared with")
    parser.add_argument("model", type=Path, help="generations of the model in question, of the same tasks")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws and of the interval's resampling")
    flags.add_teacher_flags(parser.add_argument_group("the judge's servers, as the trainer takes them"))
    flags.add_flags(parser.add_argument_group("the judge, as the trainer takes it"), flags.JUDGE_FLAGS)
    parser.set_defaults(
        criteria=["quality=1"], judge_verdict=["hard"], judge_votes=JUDGEMENTS, judge_temperature=TEMPERATURE
    )
    parser.set_defaults(tasks="documents", teacher_model=None, judge_audit_rate=0.0, judge_deadline=24 * 3600.0)


def run(given: argparse.Namespace) -> None:
    """The share of the judgements that prefer the second model, with its interval by document."""
    for name in parse_criteria(given.criteria):
        if name in LABELLED_CRITERIA:
            raise DataError(
                f"--criteria {name}: it scores answers to --tasks {LABELLED_CRITERIA[name]}, not continuations"
            )
    if has_served_criteria(given) and not given.teacher_url:
        raise DataError("compare needs --teacher-url, the judge's servers")
    result = asyncio.run(compared(judge_settings(given), given.base, given.model, given.seed))
    text = json.dumps({"base": str(given.base), "model": str(given.model), **asdict(result)}, indent=2)
    if given.output is not None:
        write_atomically(given.output, text + "\n")
    print(text)


async def compared(settings: JudgeSettings, base: Path, model: Path, seed: int) -> WinRate:
    """Judge the continuations in `model` against those in `base`.

    Raises:
        DataError: they are not of the same tasks.
    """
    before, after = read_generations(base), read_generations(model)
    require_same_tasks(base, before, model, after)
    async with Judge(settings, document_end=ENDED) as judge:
        await judge.check()
        tasks, documents = [line.task for line in after.lines], [line.document for line in after.lines]
        found, _ = await compare(
            judge,
            tasks,
            documents,
            [line.candidate for line in before.lines],
            [line.candidate for line in after.lines],
            seed,
        )
        return found


def require_same_tasks(base: Path, before: Generations, model: Path, after: Generations) -> None:
    """Raises DataError unless both files hold the same prefixes in the same order, and at least one."""
    if len(before.lines) != len(after.lines) or not after.lines:
        raise DataError(
            f"{base} holds {len(before.lines)} generations, {model} {len(after.lines)}: finish both with the same --samples"
        )
    for one, other in zip(before.lines, after.lines, strict=True):
        if (one.prefix, one.suffix) != (other.prefix, other.suffix):
            raise DataError(
                f"{base} and {model}: task {one.index} has another prefix in each; generate both with the same --data-path, "
                "--split, --subset, --seed and lengths"
            )
