"""The judge: groups of candidates in, scored groups out.

    async with Judge(settings) as judge:
        await judge.check()
        groups = await judge.score(groups, objective="dpo")

A group comes back either with its candidates that have a score, made of real verdicts alone, or with `dropped` naming
the reason: a candidate whose verdicts are missing is left out and counted, a group when fewer than two are left. Equal
texts are judged once and share their score. All draws depend only on the seed and the task, so that a resumed
step asks the same questions and finds their answers in the cache.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_sip.judge.base import UNKNOWN_CODE, AsksTeacher
from megatron_sip.judge.calls import Answer, Call
from megatron_sip.judge.catalogue import make_criterion
from megatron_sip.judge.criteria import (
    Criterion,
    CriterionScores,
    Pairwise,
    Sheet,
    comparable,
)
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.prompts import fence_code, valid_unicode
from megatron_sip.judge.python_criterion import PythonCriterion
from megatron_sip.judge.schedules import AllPairs
from megatron_sip.judge.settings import LIKELIHOOD, JudgeSettings, Objective
from megatron_sip.judge.teacher import CHECK_TIMEOUT_S
from megatron_sip.metrics import Mean
from megatron_sip.records import Candidate, CandidateKind, Group
from megatron_sip.serving.patience import longest_wait

PROMPTS_IN_FLIGHT_SHARE = 16
"""Groups worked on at once: concurrency / this. Enough to fill it; few keep prompts together and memory flat."""


_Text = tuple[str, bool]
"""A candidate's text, and whether it ended there (where that matters: likelihood, labelled tasks)."""


@dataclass(frozen=True, slots=True)
class _Weighted:
    setting: str  # the name in the settings: modes go by it
    weight: float
    criterion: Criterion


class Judge(AsksTeacher):
    """See the module. Counters: groups, verdicts, agreement with all pairs, calls, tokens, failures, latency."""

    def __init__(
        self, settings: JudgeSettings, document_end: int | None = None, policy: ChatEncoder | None = None
    ) -> None:
        """document_end: the policy's end-of-document token; candidates that end with it ended, others were cut.

        policy: its tokenizer, where its answers to labelled tasks are judged.
        """
        super().__init__(settings.client, settings.deadline_s)
        self._settings = settings
        self._document_end = document_end
        self._criteria = [
            _Weighted(name, weight, make_criterion(name, settings, policy=policy))
            for name, weight in settings.criteria.items()
        ]
        self._functions = [item.criterion for item in self._criteria if isinstance(item.criterion, PythonCriterion)]
        self._means: dict[str, Mean] = {}
        pairwise = [item.setting for item in self._criteria if isinstance(item.criterion, Pairwise)]
        self._all_pairs = {
            name: make_criterion(name, settings, AllPairs()) for name in pairwise if settings.schedule.is_sparse
        }
        self._pivot_kind = settings.schedule.pivot if settings.schedule.pivot_apart and pairwise else None
        self._ends_matter = settings.schedule.likelihood_prior or LIKELIHOOD in settings.criteria

    async def __aexit__(self, *exc_info: object) -> None:
        for function in self._functions:
            function.close()
        await super().__aexit__(*exc_info)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each criterion, by the name that scores are filed under."""
        return {item.criterion.name: item.weight for item in self._criteria}

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Raises EndpointError naming an endpoint that does not answer within `timeout_s`, and settings mistakes."""
        await super().check(timeout_s)
        await asyncio.gather(*(function.start() for function in self._functions))
        if self._settings.client is None:
            return
        endpoint = self._settings.client.endpoint
        for item in self._criteria:
            mode = item.criterion.mode
            if endpoint.kind == "sglang":
                item.criterion.check(self._client.encoder)
            if mode == "hard" or (mode == "soft" and not endpoint.continues_answers):
                self._check_reasoning(f"criterion {item.setting}")

    async def score(
        self,
        groups: Sequence[Group],
        *,
        objective: Objective = "dpo",
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Group]:
        """The groups in order, scored or dropped, within the settings' `deadline_s`, or longer while the servers answer;
        `progress` is told of each that is done.

        Groups that arrive dropped stay so. Candidates that are all the same text tie without being compared. With the
        objective "pair" two candidates are compared directly, whatever the schedule.
        """
        return await self.score_on_arrival(list(map(_present, groups)), objective=objective, progress=progress)

    async def score_on_arrival(
        self,
        arriving: Sequence[Awaitable[Group]],
        *,
        objective: Objective = "dpo",
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Group]:
        """As `score`, of groups that are not all there yet: each is judged as soon as it is, its time counts from then on, or
        from the last answer to any group before its turn came.

        What is asked about a group depends on it alone, not on when it or others arrive.
        """
        loop, client = asyncio.get_running_loop(), self._settings.client
        gate = asyncio.Semaphore(max(8, (client.in_flight if client else 0) // PROMPTS_IN_FLIGHT_SHARE))

        async def bounded(arrival: Awaitable[Group]) -> Group:
            group = await arrival
            arrived = loop.time()
            async with gate:  # to wait here for others that are answered is no silence
                deadline = longest_wait(max(arrived, self._answered_at()), self._settings.deadline_s)
                scored = await self._score_group(group, objective, deadline)
            progress(1)
            return scored

        judged = list(await asyncio.gather(*map(bounded, arriving)))
        if client is not None:
            self._client.flush()
        return judged

    def means(self) -> dict[str, Mean]:
        """What criteria found beside scores, by criterion, since the start."""
        return dict(self._means)

    def _answered_at(self) -> float:
        """When a server or function last answered, in the loop's time."""
        served = -math.inf if self._settings.client is None else self._client.pool.answered_at
        return max(served, *(function.answered_at for function in self._functions), -math.inf)

    async def _score_group(self, group: Group, objective: Objective, deadline: float) -> Group:
        if group.dropped is not None:
            return group
        apart = group if objective == "pair" else self._with_pivot(group)
        texts = list(dict.fromkeys(self._text(group, candidate) for candidate in apart.candidates))
        if not texts:
            return self._drop(group, "judge-no-candidates")
        sheet = self._sheet(apart, texts, objective)
        if sheet is None:
            return self._drop(group, "judge-context-too-short")
        results = await asyncio.gather(
            *(
                self._ask_criterion(self._asked(item, objective), item.setting, sheet, deadline)
                for item in self._criteria
            )
        )
        for item, result in zip(self._criteria, results, strict=True):
            self._count_verdicts(item.criterion.name, result)
        lost = self._lost(results)
        if len(lost) > max(0, len(texts) - 2):
            return self._drop(group, f"judge-{next(iter(lost.values()))}")
        for candidate in apart.candidates:
            if (place := texts.index(self._text(group, candidate))) in lost:
                self._counts[f"candidates/dropped/{lost[place]}"] += 1
        if objective != "pair":
            await self._audit(sheet, results, deadline)
        self._counts["groups/scored"] += 1
        return self._scored(apart, texts, sheet, results, lost)

    def _with_pivot(self, group: Group) -> Group:
        """The group with its pivot set apart, where the settings say so: a candidate of that kind, else the suffix.

        Without either (rollouts that do not begin yet) the schedule draws one of the candidates.
        """
        if self._pivot_kind is None:
            return group
        own = [i for i, candidate in enumerate(group.candidates) if candidate.kind == self._pivot_kind]
        if not own:
            is_suffix = self._pivot_kind == "suffix"
            suffix = Candidate("suffix", group.task.suffix_ids, group.task.suffix_text)
            return replace(group, pivot=suffix if is_suffix else None)
        drawn = own[int(np.random.default_rng((self._settings.seed, group.task.index, 2)).integers(len(own)))]
        others = [candidate for i, candidate in enumerate(group.candidates) if i != drawn]
        return replace(group, candidates=others, pivot=group.candidates[drawn])

    def _text(self, group: Group, candidate: Candidate) -> _Text:
        """What is judged of a candidate: those with equal ones share their scores."""
        if group.task.label is not None:
            return valid_unicode(candidate.text), not candidate.truncated
        ended = self._document_end is not None and candidate.ids[-1:] == [self._document_end]
        return valid_unicode(candidate.text), ended and self._ends_matter

    def _asked(self, item: _Weighted, objective: Objective) -> Criterion:
        return self._all_pairs.get(item.setting, item.criterion) if objective == "pair" else item.criterion

    def _lost(self, results: Sequence[CriterionScores]) -> dict[int, str]:
        """Places of the texts that a criterion has no score for, and which one, why."""
        lost: dict[int, str] = {}
        for item, result in zip(self._criteria, results, strict=True):
            for place, score in enumerate(result.scores):
                if score is None:
                    lost.setdefault(place, f"{item.criterion.name}-{result.missing}")
        return lost

    async def _ask_criterion(
        self, criterion: Criterion, setting: str, sheet: Sheet, deadline: float
    ) -> CriterionScores:
        """The criterion's scores; what is missing is put down to the most frequent kind of failure, if calls failed."""
        failures: Counter[str] = Counter()

        async def ask(calls: Sequence[Call]) -> list[Answer]:
            return await self._client.ask(calls, sheet.number, deadline, failures)

        seed = (*sheet.seed, zlib.crc32(setting.encode()))
        result = await criterion.score(
            replace(sheet, seed=seed, deadline=deadline, silence_s=self._settings.deadline_s), ask
        )
        if result.missing is None or not failures:
            return result
        return replace(result, missing=failures.most_common(1)[0][0])

    def _sheet(self, group: Group, texts: list[_Text], objective: Objective) -> Sheet | None:
        """The task as the criteria see it; None when candidates and instructions leave the judge no room for the prefix."""
        shown = [text for text, _ in texts]
        kinds: dict[_Text, CandidateKind] = {}
        copies: Counter[_Text] = Counter()
        for candidate in reversed(group.candidates):
            kinds[self._text(group, candidate)] = candidate.kind
            copies[self._text(group, candidate)] += 1
        places = [kinds[text] for text in texts]
        pivot, apart = None, False
        if group.pivot is not None:
            text = valid_unicode(group.pivot.text)
            apart = text not in shown  # an equal candidate draws with it unasked
            if apart:
                shown.append(text)
                places.append(group.pivot.kind)
            pivot = shown.index(text)
        original, whole = valid_unicode(group.task.suffix_text), valid_unicode(group.task.prefix_text)
        seed = (self._settings.seed, group.task.index)
        ended = frozenset(i for i, (_, ended) in enumerate(texts) if ended)
        bare = Sheet(
            prefix="",
            original=original,
            candidates=tuple(shown),
            kinds=tuple(places),
            code=UNKNOWN_CODE,
            seed=seed,
            number=group.task.index,
            objective=objective,
            ended=ended,
            pivot=pivot,
            apart=apart,
            copies=tuple(copies[text] for text in texts),
            label=group.task.label,
        )
        prefix = self._shown(whole, bare)
        if prefix is None:
            return None
        self._counts["prefixes-cut"] += prefix != whole
        code = fence_code(self._settings.seed, prefix, [*shown, original])
        return replace(bare, prefix=prefix, code=code)

    def _shown(self, prefix: str, bare: Sheet) -> str | None:
        """The end of the prefix that fits beside the longest request (a likelihood prior's is shorter); None: next to none."""
        calls = [call for item in self._criteria if (call := item.criterion.longest_call(bare)) is not None]
        if not calls:
            return prefix
        window = self._client.window(self._settings.prefix_chars)
        return window.shown(prefix, lambda: max(map(self._client.request_tokens, calls)))

    def _scored(
        self, group: Group, texts: list[_Text], sheet: Sheet, results: Sequence[CriterionScores], lost: dict[int, str]
    ) -> Group:
        """The group with its candidates that have scores, and these scores; duplicates share theirs."""
        kept = [place for place in range(len(texts)) if place not in lost]
        total, alone = np.zeros(len(texts)), len(self._criteria) == 1
        for item, result in zip(self._criteria, results, strict=True):
            own = [score for place, score in enumerate(result.scores) if score is not None and place not in lost]
            total[kept] += item.weight * comparable(item.criterion.name, own, alone)
        placed = [(texts.index(self._text(group, candidate)), candidate) for candidate in group.candidates]
        order = [place for place, _ in placed if place not in lost]
        places = {place: order.index(place) for place in kept}
        if sheet.apart and sheet.pivot is not None:
            places[sheet.pivot] = -1
        named = [(item.criterion.name, result) for item, result in zip(self._criteria, results, strict=True)]
        return replace(
            group,
            candidates=[candidate for place, candidate in placed if place not in lost],
            scores=[float(total[i]) for i in order],
            criterion_scores={
                name: [score for i in order if (score := result.scores[i]) is not None] for name, result in named
            },
            votes={name: [result.votes[i] for i in order] for name, result in named},
            verdicts={name: result.verdicts(places) for name, result in named},
        )

    def _drop(self, group: Group, reason: str) -> Group:
        self._counts[f"groups/dropped/{reason}"] += 1
        return replace(group, scores=None, dropped=reason)

    async def _audit(self, sheet: Sheet, results: Sequence[CriterionScores], deadline: float) -> None:
        """On a sampled share of the groups: does the schedule find the best and worst that all pairs find?"""
        drawn = np.random.default_rng((*sheet.seed, 1)).random()
        if drawn >= self._settings.audit_rate:
            return
        for item, result in zip(self._criteria, results, strict=True):
            if item.setting not in self._all_pairs:
                continue
            full = await self._ask_criterion(self._all_pairs[item.setting], item.setting, sheet, deadline)
            if full.missing is None and result.missing is None:
                name, truth, found = item.criterion.name, np.array(full.scores, float), np.array(result.scores, float)
                self._counts[f"audit/{name}/groups"] += 1
                self._counts[f"audit/{name}/same-best"] += int(truth.argmax() == found.argmax())
                self._counts[f"audit/{name}/same-worst"] += int(truth.argmin() == found.argmin())

    def _count_verdicts(self, name: str, result: CriterionScores) -> None:
        self._counts[f"verdicts/{name}"] += result.received
        self._counts[f"verdicts-missing/{name}"] += result.planned - result.received
        for note, value in result.notes.items():
            if isinstance(value, Mean):
                self._means[f"{name}/{note}"] = self._means.get(f"{name}/{note}", Mean(0.0, 0.0)) + value
            else:
                self._counts[f"{name}/{note}"] += value  # type: ignore[assignment]
        if result.history is not None and result.history.first.size:
            self._counts[f"first-shown-preferred/{name}"] += float(result.history.outcome.sum())  # type: ignore[assignment]


async def _present(group: Group) -> Group:
    """A group that is there, as one that arrives."""
    return group
