"""Negative log-likelihood of held-out text by a model, through the engines that serve it.

A file of lines, one a task, grows while it is measured, and is continued after a kill: `index`, `document`, `tokens` and `nll`,
the sum over these tokens in nats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.errors import UserError
from megatron_sip.evaluation.generation import DrawsTasks
from megatron_sip.evaluation.growing_file import append, begin
from megatron_sip.evaluation.results import Result
from megatron_sip.evaluation.win_rate import bootstrap_interval
from megatron_sip.files import described, read_json_lines
from megatron_sip.records import Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import Failure

FORMAT = "megatron-sip nll 1"
WHAT = "a file of negative log-likelihoods"


class MeasuringError(UserError, RuntimeError):
    """The engines gave no log-probs; the message says what is kept and what to do."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One line: `nll` nats of the `tokens` tokens of a task of `document`."""

    index: int
    document: str
    tokens: int
    nll: float


async def measure(
    path: Path,
    header: Mapping[str, Any],
    engines: SGLangPool,
    tasks: DrawsTasks,
    samples: int,
    *,
    batch: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Measured]:
    """The NLL of the first `samples` tasks' suffixes given their prefixes, added to `path` behind those that it holds.

    Raises:
        DataError: `path` holds something else, or is of another model or other tasks.
        MeasuringError: the engines did not answer.
    """
    done = begin(path, {"format": FORMAT, **header}, WHAT)
    progress(min(done, samples))
    while done < samples:
        drawn = tasks.tasks(done, min(batch, samples - done))
        found = await engines.logprobs([task.prefix_ids for task in drawn], [task.suffix_ids for task in drawn])
        lines = []
        for task, logprobs in zip(drawn, found, strict=True):
            if isinstance(logprobs, Failure):
                raise MeasuringError(_lost(found, logprobs))
            document = ":".join(map(str, tasks.document(task.index)))
            lines.append(Measured(task.index, document, len(logprobs), -float(np.sum(logprobs, dtype=np.float64))))
        append(path, [asdict(line) for line in lines])
        done += len(lines)
        progress(len(lines))
    with described(path, WHAT):
        return [Measured(**value) for value in read_json_lines(path, WHAT)[1 : samples + 1]]


def _lost(found: Sequence[list[float] | Failure], first: Failure) -> str:
    kinds = Counter(answer.kind for answer in found if isinstance(answer, Failure))
    return (
        f"{kinds.total()} of {len(found)} tasks got no log-probs ({', '.join(map(str, kinds))}), as: {first.reason}. What was "
        "measured before is kept: once the engine answers, the same command goes on"
    )


async def suffix_nll(
    engines: SGLangPool, tasks: Sequence[Task], version: str
) -> tuple[list[float | None], Counter[str]]:
    """Nats of each task's suffix given its prefix under the weights of `version`, None where the engines gave none; and how
    many those are, by kind."""
    prefixes, suffixes = [task.prefix_ids for task in tasks], [task.suffix_ids for task in tasks]
    answers = await engines.logprobs(prefixes, suffixes, weight_version=version)
    found = [None if isinstance(answer, Failure) else -math.fsum(answer) for answer in answers]
    return found, Counter(answer.kind for answer in answers if isinstance(answer, Failure))


def nll_result(lines: Sequence[Measured], dataset: str, seed: int) -> Result:
    """Nats a token, the mean over all tokens; its interval resamples documents, and is None of a single one."""
    tokens, documents = np.array([line.tokens for line in lines], float), [line.document for line in lines]
    per_token = np.array([line.nll for line in lines]) / tokens
    interval = bootstrap_interval(per_token, documents, seed, tokens) if len(set(documents)) > 1 else None
    return Result("nll", dataset, float(np.average(per_token, weights=tokens)), len(lines), interval)
