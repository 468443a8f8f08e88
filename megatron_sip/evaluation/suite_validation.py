"""What a run on documents measures on held-out ones every so many steps, by its own engines.

validation/nll/suffix            nats a token of the true suffixes, given their prefixes; over tokens
validation/diversity/distinct-3  of the policy's continuations, as are the two below: see `diversity`
validation/diversity/repetition
validation/diversity/words
validation/win-rate/initial      over the initial policy's continuations: the mean of the judgements
validation/safety/SET            of continuations of a set's prompts, the share that most votes call safe
validation/failed/REASON         prefixes that an engine or the judge gave no answer about
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.initial_policy import InitialPolicy, InitialPolicyFile
from megatron_sip.evaluation.majority import SAFETY, majority
from megatron_sip.evaluation.nll import suffix_nll
from megatron_sip.evaluation.win_rate import NoVerdictError, compare, continue_prefixes
from megatron_sip.experience.maker import ScoresGroups
from megatron_sip.metrics import Mean, Metrics, merge
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings

DIVERSITY = ("distinct_3", "repetition", "words")
NO_VERDICT = "validation/failed/no verdict"


class SuiteValidation:
    """Measures `suites` (of nll, diversity, win-rate) on always the same `tasks`; `documents` names the document of each.

    prompts: by the names of their sets, tasks whose continuations are rated.
    """

    def __init__(
        self,
        suites: Sequence[str],
        tasks: Sequence[Task],
        documents: Sequence[Hashable],
        prompts: Mapping[str, Sequence[Task]],
        sampling: SamplingSettings,
        tokenizer: Any,
        initial: Path,
        seed: int,
    ) -> None:
        self._suites = suites
        self._tasks = tasks
        self._documents = documents
        self._prompts = prompts
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._initial = InitialPolicyFile(initial, tasks, sampling, "--eval-records")
        self._seed = seed

    def check_initial(self) -> None:
        """Of a run that goes on: is there something to compare with? Raises DataError."""
        if "win-rate" in self._suites:
            self._initial.read()

    async def measure(
        self, engines: SGLangPool, judge: ScoresGroups | None, rater: ScoresGroups | None, version: str
    ) -> Metrics:
        """The metrics of the weights of `version`; the initial ones' continuations are kept for the win rate.

        judge: of the win rate. rater: of the sets of prompts.
        """
        parts: list[Metrics] = []
        for name, tasks in self._prompts.items():
            made = await self._continue(engines, tasks, version)
            parts += [failed_continuations(made), await safety(rater, name, tasks, made)]
        if "nll" in self._suites:
            parts.append(await self._nll(engines, version))
        if "diversity" in self._suites or "win-rate" in self._suites:
            parts.append(await self._of_continuations(engines, judge, version))
        return merge(parts)

    async def _of_continuations(self, engines: SGLangPool, judge: ScoresGroups | None, version: str) -> Metrics:
        made = await self._continue(engines, self._tasks, version)
        metrics = failed_continuations(made)
        if "diversity" in self._suites:
            texts = [each.text for each in made if each is not None]
            found = diversity(texts) if texts else {}
            metrics |= {f"validation/diversity/{name.replace('_', '-')}": found[name] for name in DIVERSITY if found}
        if "win-rate" in self._suites:
            metrics |= await self._win_rate(judge, made, version)
        return metrics

    async def _continue(self, engines: SGLangPool, tasks: Sequence[Task], version: str) -> list[Candidate | None]:
        return await continue_prefixes(engines, tasks, self._sampling, self._tokenizer, version)

    async def _win_rate(self, judge: ScoresGroups | None, made: Sequence[Candidate | None], version: str) -> Metrics:
        assert judge is not None, "win rates have a judge"
        if version == "0":
            self._initial.write(InitialPolicy(list(made), [], []))
            return {}
        initial = self._initial.read().continuations
        pairs = sum(a is not None and b is not None for a, b in zip(initial, made, strict=True))
        try:
            found, _ = await compare(judge, self._tasks, self._documents, initial, made, self._seed)
        except NoVerdictError:  # training goes on; the counts say what is missing
            return {NO_VERDICT: float(pairs)} if pairs else {}
        metrics: Metrics = {"validation/win-rate/initial": found.win_rate}
        return metrics | ({NO_VERDICT: float(pairs - found.prompts)} if pairs > found.prompts else {})

    async def _nll(self, engines: SGLangPool, version: str) -> Metrics:
        nll, failed = await suffix_nll(engines, self._tasks, version)
        metrics: Metrics = {f"validation/failed/nll {kind}": float(count) for kind, count in failed.items()}
        read = [(nats, len(task.suffix_ids)) for task, nats in zip(self._tasks, nll, strict=True) if nats is not None]
        if read:
            metrics["validation/nll/suffix"] = Mean(
                sum(nats for nats, _ in read), float(sum(count for _, count in read))
            )
        return metrics


def failed_continuations(made: Sequence[Candidate | None]) -> Metrics:
    """How many prefixes the engines did not continue."""
    failed = sum(each is None for each in made)
    return {"validation/failed/no continuation": float(failed)} if failed else {}


async def safety(
    rater: ScoresGroups | None, name: str, tasks: Sequence[Task], made: Sequence[Candidate | None]
) -> Metrics:
    """The mean over the continuations of prompts of the set `name` of what most votes say."""
    assert rater is not None, "sets have a judge"
    groups = [Group(task, [each]) for task, each in zip(tasks, made, strict=True) if each is not None]
    judged = await rater.score(groups, objective="dpo")
    votes = [[vote for _, vote in group.verdicts[SAFETY]] for group in judged if group.scores is not None]
    metrics: Metrics = {NO_VERDICT: float(len(judged) - len(votes))} if len(votes) < len(judged) else {}
    if votes:
        metrics[f"validation/safety/{name}"] = Mean(sum(map(majority, votes)), float(len(votes)))
    return metrics
