"""From tasks to training examples: rollouts, rewrites, judgement, selection. Runs on each data-parallel leader.

           +-> engines: rollouts, K per prefix -+
    tasks -+                                   +-> judge -> select -> examples
           +-> teacher: rewrite ---------------+

Rollouts and rewrites of all tasks are asked for at once; a group is judged as soon as its own are there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_sip.data.continuation_text import rollout_texts
from megatron_sip.experience.advantages import reward_metrics
from megatron_sip.experience.arrival import ArrivalClock
from megatron_sip.experience.control import ControlIds
from megatron_sip.experience.kind_steps import ALWAYS, KindSteps
from megatron_sip.experience.recording import read_groups, write_groups
from megatron_sip.experience.samples import SampleLog
from megatron_sip.experience.selection import SelectionSettings, select, selection_metrics
from megatron_sip.experience.thinking import thought_metrics
from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import (
    CANDIDATE_KINDS,
    Candidate,
    CandidateKind,
    Example,
    Group,
    Judgement,
    Label,
    Rewriting,
    Task,
)
from megatron_sip.rollout.pool import PoolCounters, SGLangPool
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings, drawn_seed

GAUGES = ("cached-share", "latency-", "first-shown-preferred")
"""Counters of the teacher's clients that are shares or percentiles, not totals."""


class ScoresGroups(Protocol):
    """What is needed of a judge."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each criterion, by the name that its scores are filed under."""
        ...

    async def score(self, groups: Sequence[Group], *, objective: Literal["dpo", "rf-nll", "pair"]) -> list[Group]:
        """The same groups in order, each with scores or with the reason why it is dropped."""
        ...

    def counters(self) -> dict[str, float]:
        """Running totals of calls, tokens, failures and so on."""
        ...

    def means(self) -> Mapping[str, Mean]:
        """Running means of what is found beside scores."""
        ...


class ScoresArrivals(ScoresGroups, Protocol):
    """And in training."""

    async def score_on_arrival(
        self,
        arriving: Sequence[Awaitable[Group]],
        *,
        objective: Literal["dpo", "rf-nll", "pair"],
        progress: Callable[[int], object],
    ) -> list[Group]:
        """As `score`, each group judged once it is there."""
        ...


class RewritesSuffixes(Protocol):
    """What is needed of a rewriter."""

    def begin(self, tasks: Sequence[Task]) -> list[asyncio.Task[Candidate | None]]:
        """A rewrite for each task, under way; None where there is none."""
        ...

    def counters(self) -> dict[str, float]:
        """Running totals."""
        ...


@dataclass(frozen=True, slots=True)
class ExperienceSettings:
    """kinds: candidates to make, at the steps that `kind_steps` says.

    samples: where a few judged groups are kept for people to read. rollout_seed: rollouts are drawn by it and their task,
    for engines that take seeds; None leaves the draws to the engines.
    record: folder to write judged groups to, as `replica`. replay: folder to read them from instead of making any.
    """

    kinds: tuple[CandidateKind, ...]
    sampling: SamplingSettings
    selection: SelectionSettings
    kind_steps: KindSteps = ALWAYS
    replica: int = 0
    record: Path | None = None
    replay: Path | None = None
    samples: SampleLog | None = None
    rollout_seed: int | None = None

    def kinds_at(self, step: int) -> tuple[CandidateKind, ...]:
        """The kinds of candidates of optimizer step `step` (0 is the first)."""
        return self.kind_steps.at(self.kinds, step)


@dataclass(frozen=True, slots=True)
class Experience:
    """What one leader made of its share of a step's tasks; `unrecorded` says why its groups could not be kept."""

    examples: list[Example]
    metrics: Metrics
    unrecorded: str | None = None


@dataclass(frozen=True, slots=True)
class RewritesAhead:
    """Rewrites under way for the tasks of the next step."""

    indices: list[int]
    rewrites: list[asyncio.Task[Candidate | None]]


class ExperienceMaker:
    """Turns tasks into examples, by way of the engines and the teacher."""

    def __init__(
        self,
        settings: ExperienceSettings,
        tokenizer: Any,
        engines: SGLangPool | None,
        judge: ScoresArrivals | None,
        rewriter: RewritesSuffixes | None,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._engines = engines
        self._judge = judge
        self._rewriter = rewriter
        control = settings.selection.control
        self._control_ids = None if control is None else ControlIds.of(control, tokenizer)
        self._seen_counters: dict[str, float] = {}
        self._seen_means: dict[str, Mean] = {}
        self._ahead: RewritesAhead | None = None

    async def make(
        self,
        step: int,
        tasks: Sequence[Task],
        next_tasks: Sequence[Task] = (),
        round_index: int = 0,
        version: str | None = None,
    ) -> Experience:
        """Candidates, scores and examples for `tasks`, a round of optimizer step `step` (0 is the first of each).

        Rollouts are by weights of `version` only, those of the step unless given.

        The rewrites of `next_tasks`, which the next call is to be about, are begun before this one returns.
        """
        if self._settings.replay is not None:
            groups, seconds = read_groups(self._settings.replay, step, tasks), Metrics()
        else:
            groups, seconds = await self._judged_groups(step, tasks, version or str(step))
        unrecorded = None
        if self._settings.record is not None:
            try:
                write_groups(self._settings.record, step, self._settings.replica, groups, round_index)
            except OSError as error:
                unrecorded = f"--save-groups {self._settings.record} took no more: {error.strerror or error}"
        selection = replace(self._settings.selection, candidates=self._settings.kinds_at(step))
        selected = select(groups, selection, self._control_ids)
        if self._settings.samples is not None and round_index == 0:
            self._settings.samples.record(step, groups, selected.examples)
        metrics = selection_metrics(groups, selected)
        if selection.objective == "grpo":
            metrics |= reward_metrics(groups, selection.truncated)
        metrics |= candidate_lengths(groups) | staleness(groups, step)
        metrics |= thought_metrics(groups, partial(plain_text, self._tokenizer))
        metrics |= {f"dropped/{reason}": float(count) for reason, count in selected.dropped.items()}
        metrics |= self._counters() | seconds
        metrics |= {"groups": float(len(groups)), "merged_candidates": float(selected.merged)}
        ahead = self._settings.replay is None and "rewrite" in self._settings.kinds_at(step + 1)
        if next_tasks and ahead and self._rewriter is not None:
            self._ahead = RewritesAhead([task.index for task in next_tasks], self._rewriter.begin(next_tasks))
        return Experience(selected.examples, metrics, unrecorded)

    async def _judged_groups(self, step: int, tasks: Sequence[Task], version: str) -> tuple[list[Group], Metrics]:
        """Groups with scores (when the objective needs them), and the seconds of each phase."""
        kinds, clock = self._settings.kinds_at(step), ArrivalClock()
        rewrites = self._rewrites(tasks) if "rewrite" in kinds else [None for _ in tasks]
        arriving = [
            self._group(task, kinds, rewrite, version, clock) for task, rewrite in zip(tasks, rewrites, strict=True)
        ]
        if not self._settings.selection.needs_judge:
            return list(await asyncio.gather(*arriving)), clock.seconds()
        assert self._judge is not None
        groups = await self._judge.score_on_arrival(arriving, objective=self._judged_objective(), progress=clock.judged)
        return groups, clock.seconds()

    def _judged_objective(self) -> Literal["dpo", "rf-nll"]:
        """What the schedule is to find: both ends of the ranking, or, for RF-NLL, the best alone. GRPO learns from all."""
        return "rf-nll" if self._settings.selection.objective == "rf-nll" else "dpo"

    async def _group(
        self,
        task: Task,
        kinds: Sequence[CandidateKind],
        rewrite: asyncio.Task[Candidate | None] | None,
        version: str,
        clock: ArrivalClock,
    ) -> Group:
        """A task with its candidates, once all of them are there; rollouts by weights of `version` only."""
        rollouts = await self._rollouts(task, version) if "rollout" in kinds else []
        group = build_group(task, kinds, rollouts, None if rewrite is None else await rewrite)
        clock.arrived()
        return group

    async def _rollouts(self, task: Task, version: str) -> list[Candidate] | str:
        """K rollouts of a task, or the reason why there are none; by weights of `version` only."""
        assert self._engines is not None
        seed = self._settings.rollout_seed
        seeds = None if seed is None else [drawn_seed(seed, task.index)]
        [answer] = await self._engines.generate(
            [task.prefix_ids], self._settings.sampling, seeds=seeds, weight_version=version
        )
        return answer.kind if isinstance(answer, Failure) else self._as_candidates(task, answer)

    def _as_candidates(self, task: Task, completions: Sequence[Completion]) -> list[Candidate]:
        if task.label is not None:
            return [answer_to(self._tokenizer, task.label, completion) for completion in completions]
        texts = rollout_texts(self._tokenizer, task, [c.ids for c in completions])
        return [
            Candidate("rollout", list(c.ids), text, list(c.logprobs), c.weight_version, c.finish_reason == "length")
            for c, text in zip(completions, texts, strict=True)
        ]

    def _rewrites(self, tasks: Sequence[Task]) -> list[asyncio.Task[Candidate | None]]:
        """A rewrite of each task, under way: since the last step, if that began them."""
        assert self._rewriter is not None
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._rewriter.begin(tasks)
        if ahead.indices != [task.index for task in tasks]:
            raise ValueError(f"rewrites were made ahead for tasks {ahead.indices}, not for those of this step")
        return ahead.rewrites

    def forget_counts(self) -> None:
        """Leave what engines and judge have counted since the last step out of the next one's metrics, whose rewrites stay."""
        rewriter = {name: value for name, value in self._seen_counters.items() if name.startswith("rewriter/")}
        self._counters()
        self._seen_counters |= rewriter

    def _counters(self) -> Metrics:
        """What the clients counted in this step; shares and percentiles are those since the start."""
        totals: dict[str, float] = {}
        if self._engines is not None:
            totals |= {f"rollout/{name}": value for name, value in pool_counts(self._engines.counters).items()}
        for room, source in (("judge", self._judge), ("rewriter", self._rewriter)):
            if source is not None:
                totals |= {f"{room}/{name}": value for name, value in source.counters().items()}
        metrics: Metrics = {}
        for name, value in totals.items():
            is_gauge = name.split("/")[1].startswith(GAUGES)
            metrics[name] = Mean(value) if is_gauge else value - self._seen_counters.get(name, 0.0)
        self._seen_counters = totals
        means = dict(self._judge.means()) if self._judge is not None else {}
        for name, mean in means.items():
            seen = self._seen_means.get(name, Mean(0.0, 0.0))
            metrics[f"judge/{name}"] = Mean(mean.total - seen.total, mean.weight - seen.weight)
        self._seen_means = means
        return metrics


def answer_to(tokenizer: Any, label: Label, completion: Completion) -> Candidate:
    """A rollout of a labelled task, with its text as a server gives it to those who read it.

    A verdict whose answer we began is its first token, as it is for the judge that is trained so: of what comes then
    nothing is learnt.
    """
    ids, logprobs, cut = list(completion.ids), list(completion.logprobs), completion.finish_reason == "length"
    said = ids if cut else ids[:-1]  # without the token that ends the answer
    if isinstance(label, Judgement) and label.forced:
        ids, said, logprobs, cut = ids[:1], said[:1], logprobs[:1], False
    if isinstance(label, Judgement | Rewriting) and label.special_marks:
        text = str(tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    else:
        text = plain_text(tokenizer, ids)
    return Candidate("rollout", ids, text, logprobs, completion.weight_version, cut)


def plain_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer to a labelled task, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pool_counts(counters: PoolCounters) -> dict[str, float]:
    """The engines' client's counters as flat numbers."""
    plain = {field.name: getattr(counters, field.name) for field in fields(counters)}
    numbers = {name: float(value) for name, value in plain.items() if not isinstance(value, Counter)}
    for group in ("failures", "attempt_failures"):
        numbers |= {f"{group}/{kind}": float(count) for kind, count in plain[group].items()}
    return numbers


def build_group(
    task: Task,
    kinds: Sequence[CandidateKind],
    rollouts: list[Candidate] | str,
    rewrite: Candidate | None,
) -> Group:
    """The candidates of a task in canonical order; a task whose rollouts failed is dropped with that reason.

    A missing rewrite (refused, empty) only leaves the group without it: the rewriter counts why.
    """
    candidates = []
    if "suffix" in kinds:
        candidates.append(Candidate("suffix", task.suffix_ids, task.suffix_text))
    if rewrite is not None:
        candidates.append(rewrite)
    if isinstance(rollouts, str):
        return Group(task, candidates, dropped=f"rollout {rollouts}")
    candidates += [rollout for rollout in rollouts if rollout.ids]
    return Group(task, candidates)


def candidate_lengths(groups: Sequence[Group]) -> Metrics:
    """Mean tokens by candidate kind."""
    lengths: Metrics = {}
    for kind in CANDIDATE_KINDS:
        counts = [len(candidate.ids) for group in groups for candidate in group.candidates if candidate.kind == kind]
        lengths[f"length/{kind}"] = Mean(float(sum(counts)), float(len(counts)))
    return lengths


def staleness(groups: Sequence[Group], step: int) -> Metrics:
    """How many updates the policy of `step` is ahead of the one that sampled the rollouts; nothing without any."""
    versions = [c.weight_version for group in groups for c in group.candidates if c.weight_version is not None]
    ages = [step - int(version) for version in versions if version.isdecimal()]
    return {"staleness": Mean(float(sum(ages)), float(len(ages)))} if ages else {}
