"""How far one policy is preferred over another: continuations of the same prefixes, judged (paper section 3.3).

The prefixes come from documents that training never saw. What counts of a prefix is the mean of its judgements, never a
threshold on it: two options that the judge prefers with 0.4 and 0.6 count 0.6, not a win. Several prefixes may be cut
from one document and are then not independent: the interval is a bootstrap over documents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sip.data.continuation_text import rollout_texts
from megatron_sip.errors import UserError
from megatron_sip.experience.maker import ScoresGroups
from megatron_sip.experience.selection import TIE_TOLERANCE
from megatron_sip.judge.settings import LIKELIHOOD
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import Failure, SamplingSettings

log = logging.getLogger(__name__)

RESAMPLES = 10_000
DRAWS_AT_ONCE = 1 << 22
"""Drawn numbers of a bootstrap that memory holds, of resamples times documents."""
FEW_DOCUMENTS = 20
"""Below so many, a bootstrap over documents is too narrow."""
Z95 = 1.959964


class NoVerdictError(UserError, RuntimeError):
    """No prefix was judged; the message says what to look at."""


@dataclass(frozen=True, slots=True)
class WinRate:
    """How far the second policy was preferred over the first: the mean over prefixes of `preference`.

    win_rate_ci95: see `interval`; it covers the choice of documents and, with it, the draws of continuations and votes,
    but neither another training run nor what a judge prefers by mistake. by_criterion: the same mean for each criterion.
    prompts: prefixes with a verdict, from `documents` documents. failed: prefixes without one (engine failure, missing
    votes). mean_scores: the judge's mean score of the first and the second policy.
    """

    win_rate: float
    win_rate_ci95: tuple[float, float]
    prompts: int
    documents: int
    failed: int
    mean_scores: tuple[float, float]
    by_criterion: dict[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One judged prefix, for the report: score_before and score_after are None when there was no verdict."""

    prefix: str
    before: str
    after: str
    score_before: float | None
    score_after: float | None


async def continue_prefixes(
    engines: SGLangPool, tasks: Sequence[Task], sampling: SamplingSettings, tokenizer: Any, version: str
) -> list[Candidate | None]:
    """One continuation a task by the weights of `version`; None where the engine failed."""
    answers = await engines.generate([task.prefix_ids for task in tasks], sampling, weight_version=version)
    continuations: list[Candidate | None] = []
    for task, answer in zip(tasks, answers, strict=True):
        if isinstance(answer, Failure) or not answer[0].ids:
            continuations.append(None)
        else:
            [text] = rollout_texts(tokenizer, task, [answer[0].ids])
            continuations.append(Candidate("rollout", list(answer[0].ids), text))
    return continuations


async def compare(
    judge: ScoresGroups,
    tasks: Sequence[Task],
    documents: Sequence[Hashable],
    before: Sequence[Candidate | None],
    after: Sequence[Candidate | None],
    seed: int,
) -> tuple[WinRate, list[Comparison]]:
    """Judge `after` against `before` on every task where both exist; `documents` names each task's document.

    Raises:
        NoVerdictError: not a single prefix got a verdict.
    """
    everything = zip(tasks, documents, before, after, strict=True)
    pairs = [(t, d, b, a) for t, d, b, a in everything if b is not None and a is not None]
    judged = await judge.score([Group(task, [b, a]) for task, _, b, a in pairs], objective="pair")
    verdicts = [
        (group, pair[1]) for group, pair in zip(judged, pairs, strict=True) if is_compared(group, judge.weights)
    ]
    if not verdicts:
        why = "is the judge reachable?" if pairs else "the engines continued none of them for both policies"
        raise NoVerdictError(f"none of the {len(tasks)} held-out prefixes got a verdict: {why}")
    judged_documents = [document for _, document in verdicts]
    if (count := len(set(judged_documents))) < FEW_DOCUMENTS:
        log.warning("held-out comparison: %d documents say little, %d or more are needed", count, FEW_DOCUMENTS)
    parts = {name: np.array([preference(name, group) for group, _ in verdicts], float) for name in judge.weights}
    outcomes = np.average(np.stack(list(parts.values())), axis=0, weights=list(judge.weights.values()))
    before_mean, after_mean = np.array([group.scores for group, _ in verdicts], dtype=np.float64).mean(axis=0)
    return (
        WinRate(
            win_rate=float(outcomes.mean()),
            win_rate_ci95=interval(outcomes, judged_documents, seed),
            prompts=len(outcomes),
            documents=len(set(judged_documents)),
            failed=len(tasks) - len(outcomes),
            mean_scores=(float(before_mean), float(after_mean)),
            by_criterion={name: float(values.mean()) for name, values in parts.items()},
        ),
        [as_comparison(group) for group in judged],
    )


def is_compared(group: Group, criteria: Iterable[str]) -> bool:
    """Whether each of the criteria has found how far it prefers the second candidate."""
    return group.scores is not None and all(preference(name, group) is not None for name in criteria)


def preference(criterion: str, group: Group) -> float | None:
    """How far a criterion prefers the second candidate of a judged pair, 0 .. 1; 0.5: not at all.

    Pairwise: the mean of the judgements in each order, and of the two orders; None without a judgement in one of them, which
    would be the judge's taste for places. Pointwise: (1 + difference of the mean scores) / 2; of verdicts that are 0 or 1 that
    is the share of comparisons between one about each that it wins, ties half. Likelihood is one measurement, and wins, ties or
    loses.
    """
    before, after = group.criterion_scores[criterion]
    if criterion == LIKELIHOOD:
        return 0.5 if abs(after - before) <= TIE_TOLERANCE else float(after > before)
    pairs = [verdict for verdict in group.verdicts.get(criterion, ()) if len(verdict) == 3]
    if not pairs:
        return (1.0 + after - before) / 2  # two equal texts tie, and are not shown
    in_order = [[outcome for first, _, outcome in pairs if first == place] for place in (0, 1)]
    if not all(in_order):
        return None
    before_first, after_first = (sum(own) / len(own) for own in in_order)
    return (1.0 - before_first + after_first) / 2


def as_comparison(group: Group) -> Comparison:
    """A judged (before, after) group as a line of the report."""
    before, after = group.candidates
    scores = group.scores if group.scores is not None else [None, None]
    return Comparison(group.task.prefix_text, before.text, after.text, scores[0], scores[1])


def interval(outcomes: np.ndarray, documents: Sequence[Hashable], seed: int) -> tuple[float, float]:
    """95% interval of the mean of `outcomes` [n], each from 0 to 1: `bootstrap_interval`.

    With few documents, or such as all agree, it is widened to Wilson's interval of as many independent outcomes: five wins of
    five say no more than that the win rate is above a half.
    """
    low, high = bootstrap_interval(outcomes, documents, seed)
    count = len(set(documents))
    if count >= FEW_DOCUMENTS and low < high:
        return low, high
    wilson_low, wilson_high = wilson_interval(float(outcomes.mean()), count)
    return min(low, wilson_low), max(high, wilson_high)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a share among `count` independent outcomes."""
    spread = Z95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    outcomes: np.ndarray, documents: Sequence[Hashable], seed: int, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """95% percentile interval of the mean of `outcomes` [n], resampling whole documents ([n], which one each is of).

    weights: [n], of a weighted mean.
    """
    number = {document: index for index, document in enumerate(dict.fromkeys(documents))}
    place = np.array([number[document] for document in documents])
    weights = np.ones(len(outcomes)) if weights is None else weights
    totals, counts = np.bincount(place, weights=outcomes * weights), np.bincount(place, weights=weights)
    rng, at_once, means = np.random.default_rng(seed), max(1, DRAWS_AT_ONCE // len(number)), []
    for first in range(0, RESAMPLES, at_once):
        draws = rng.integers(0, len(number), size=(min(at_once, RESAMPLES - first), len(number)))
        means.append(totals[draws].sum(axis=1) / counts[draws].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
