"""What a run on documents measures on held-out ones every so many steps, by its own engines.

validation/nll/suffix            nats a token of the true suffixes, given their prefixes; over tokens
validation/diversity/distinct-3  of the policy's continuations, as are the two below: see `diversity`
validation/diversity/repetition
validation/diversity/words
validation/win-rate/initial      over the initial policy's continuations: the mean of the judgements
validation/failed/REASON         prefixes that an engine or the judge gave no answer about
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.held_out import load_continuations, save_continuations
from megatron_sip.evaluation.win_rate import compare, continue_prefixes
from megatron_sip.experience.maker import ScoresGroups
from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import Candidate, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import Failure, SamplingSettings

DIVERSITY = ("distinct_3", "repetition", "words")
NO_VERDICT = "validation/failed/no verdict"


class SuiteValidation:
    """Measures `suites` (of nll, diversity, win-rate) on always the same `tasks`; `documents` names the document of each."""

    def __init__(
        self,
        suites: Sequence[str],
        tasks: Sequence[Task],
        documents: Sequence[Hashable],
        sampling: SamplingSettings,
        tokenizer: Any,
        initial: Path,
        seed: int,
    ) -> None:
        self._suites = suites
        self._tasks = tasks
        self._documents = documents
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._initial = initial
        self._seed = seed

    async def measure(self, engines: SGLangPool, judge: ScoresGroups | None, version: str) -> Metrics:
        """The metrics of the weights of `version`; the initial ones' continuations are kept for the win rate."""
        metrics: Metrics = {}
        if "nll" in self._suites:
            metrics |= await suffix_nll(engines, self._tasks, version)
        if "diversity" not in self._suites and "win-rate" not in self._suites:
            return metrics
        made = await continue_prefixes(engines, self._tasks, self._sampling, self._tokenizer, version)
        if failed := sum(each is None for each in made):
            metrics["validation/failed/no continuation"] = float(failed)
        if "diversity" in self._suites:
            found = diversity([each.text for each in made if each is not None])
            metrics |= {f"validation/diversity/{name.replace('_', '-')}": found[name] for name in DIVERSITY}
        if "win-rate" in self._suites:
            metrics |= await self._win_rate(judge, made, version)
        return metrics

    async def _win_rate(self, judge: ScoresGroups | None, made: Sequence[Candidate | None], version: str) -> Metrics:
        assert judge is not None, "win rates have a judge"
        if version == "0":
            save_continuations(self._initial, made)
            return {}
        initial = load_continuations(self._initial)
        found, _ = await compare(judge, self._tasks, self._documents, initial, made, self._seed)
        metrics: Metrics = {"validation/win-rate/initial": found.win_rate}
        without = found.failed - sum(a is None or b is None for a, b in zip(initial, made, strict=True))
        return metrics | ({NO_VERDICT: float(without)} if without else {})


async def suffix_nll(engines: SGLangPool, tasks: Sequence[Task], version: str) -> Metrics:
    """The mean over all suffixes' tokens of their negative log-prob under the weights of `version`."""
    answers = await engines.logprobs(
        [task.prefix_ids for task in tasks], [task.suffix_ids for task in tasks], weight_version=version
    )
    read = [answer for answer in answers if not isinstance(answer, Failure)]
    kinds = Counter(answer.kind for answer in answers if isinstance(answer, Failure))
    metrics: Metrics = {f"validation/failed/nll {kind}": float(count) for kind, count in kinds.items()}
    if read:
        metrics["validation/nll/suffix"] = Mean(-sum(map(sum, read)), float(sum(map(len, read))))
    return metrics
