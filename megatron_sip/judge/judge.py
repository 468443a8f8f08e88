"""The judge: groups of candidates in, scored groups out.

    async with Judge(settings) as judge:
        await judge.check()
        groups = await judge.score(groups, objective="dpo")

A group comes back either with one score a candidate, made of real verdicts alone, or with `dropped` naming the reason.
Equal texts are judged once and share their score. All draws depend only on the seed and the task, so that a resumed
step asks the same questions and finds their answers in the cache.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatron_sip.judge.base import UNKNOWN_CODE, AsksTeacher
from megatron_sip.judge.calls import Answer, Call
from megatron_sip.judge.client import CHECK_TIMEOUT_S, affinity_of
from megatron_sip.judge.criteria import (
    Criterion,
    CriterionScores,
    Pairwise,
    Pointwise,
    Sheet,
    comparable,
    make_criterion,
)
from megatron_sip.judge.prompts import fence_code, valid_unicode
from megatron_sip.judge.schedules import AllPairs
from megatron_sip.judge.settings import JudgeSettings, Objective, SettingsError
from megatron_sip.judge.window import PrefixWindow
from megatron_sip.samples import Group

PROMPTS_IN_FLIGHT_SHARE = 16
"""Groups worked on at once: concurrency / this. Enough to fill it; few keep prompts together and memory flat."""


@dataclass(frozen=True, slots=True)
class _Weighted:
    setting: str  # the name in the settings: routing and modes go by it
    weight: float
    criterion: Criterion


class Judge(AsksTeacher):
    """See the module. Counters: groups, verdicts, agreement with all pairs, calls, tokens, failures, latency."""

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__(settings.client)
        self._settings = settings
        self._criteria = [
            _Weighted(name, weight, make_criterion(name, settings)) for name, weight in settings.criteria.items()
        ]
        self._audits = {
            item.setting: make_criterion(item.setting, settings, AllPairs())
            for item in self._criteria
            if isinstance(item.criterion, Pairwise) and settings.schedule.name not in ("all_pairs", "all_pairs_swap")
        }

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each criterion, by the name that scores are filed under."""
        return {item.criterion.name: item.weight for item in self._criteria}

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Raises EndpointError naming an endpoint that does not answer within `timeout_s`, and settings mistakes."""
        await super().check(timeout_s)
        for item in self._criteria:
            if not isinstance(item.criterion, Pointwise | Pairwise):
                continue
            for endpoint in self._settings.client.endpoints_for(item.setting):
                if endpoint.kind == "sglang":
                    item.criterion.check(self._client.encoder)
                written = item.criterion.mode == "hard" or not endpoint.continues_answers
                if written and self._client.reasoning.always and not endpoint.reasoning_tokens:
                    raise SettingsError(
                        f"criterion {item.setting}: the judge's model reasons before each answer, by its chat template, and "
                        "has no tokens for it: give --teacher-reasoning-tokens, for example 2048"
                    )

    async def score(
        self, groups: Sequence[Group], *, objective: Objective = "dpo", deadline_s: float | None = None
    ) -> list[Group]:
        """The groups in order, scored or dropped, within `deadline_s` (default: the settings').

        Groups that arrive dropped stay so. Candidates that are all the same text tie without being compared.
        """
        deadline = asyncio.get_running_loop().time() + (deadline_s or self._settings.deadline_s)
        gate = asyncio.Semaphore(max(8, self._settings.client.concurrency // PROMPTS_IN_FLIGHT_SHARE))

        async def bounded(group: Group) -> Group:
            async with gate:
                return await self._score_group(group, objective, deadline)

        judged = list(await asyncio.gather(*map(bounded, groups)))
        self._client.flush()
        return judged

    async def _score_group(self, group: Group, objective: Objective, deadline: float) -> Group:
        if group.dropped is not None:
            return group
        texts = list(dict.fromkeys(valid_unicode(candidate.text) for candidate in group.candidates))
        if not texts:
            return self._drop(group, "judge-no-candidates")
        sheet = self._sheet(group, texts, objective)
        if sheet is None:
            return self._drop(group, "judge-context-too-short")
        results = await asyncio.gather(
            *(self._ask_criterion(item.criterion, item.setting, sheet, deadline) for item in self._criteria)
        )
        for item, result in zip(self._criteria, results, strict=True):
            self._count_verdicts(item.criterion.name, result)
        for item, result in zip(self._criteria, results, strict=True):
            if result.missing is not None:
                return self._drop(group, f"judge-{item.criterion.name}-{result.missing}")
        await self._audit(sheet, results, deadline)
        self._counts["groups/scored"] += 1
        return self._scored(group, texts, results)

    async def _ask_criterion(
        self, criterion: Criterion, setting: str, sheet: Sheet, deadline: float
    ) -> CriterionScores:
        """The criterion's scores; what is missing is put down to the most frequent kind of failure, if calls failed."""
        affinity = affinity_of(sheet.prefix)
        failures: Counter[str] = Counter()

        async def ask(calls: Sequence[Call]) -> list[Answer]:
            return await self._client.ask(calls, setting, affinity, deadline, failures)

        seed = (*sheet.seed, zlib.crc32(setting.encode()))
        result = await criterion.score(replace(sheet, seed=seed), ask)
        if result.missing is None or not failures:
            return result
        return replace(result, missing=failures.most_common(1)[0][0])

    def _sheet(self, group: Group, texts: list[str], objective: Objective) -> Sheet | None:
        """The task as the criteria see it; None when candidates and instructions leave the judge no room for the prefix."""
        kinds = {valid_unicode(candidate.text): candidate.kind for candidate in reversed(group.candidates)}
        reference = valid_unicode(group.task.suffix_text)
        seed = (self._settings.client.seed, group.task.index)
        places = tuple(kinds[text] for text in texts)
        whole = valid_unicode(group.task.prefix_text)
        bare = Sheet("", reference, tuple(texts), places, UNKNOWN_CODE, seed, objective)
        prefix: str | None = whole
        for item in self._criteria:
            if prefix is not None:
                prefix = self._window(item.setting).shown(prefix, partial(self._tokens_beside, item, bare))
        if prefix is None:
            return None
        self._counts["prefixes-cut"] += prefix != whole
        code = fence_code(self._settings.client.seed, prefix, [*texts, reference])
        return replace(bare, prefix=prefix, code=code)

    def _window(self, setting: str) -> PrefixWindow:
        return self._client.window(setting, self._settings.prefix_chars)

    def _tokens_beside(self, item: _Weighted, bare: Sheet) -> int:
        """What the longest request of a criterion takes beside the prefix. With a likelihood prior, that one is shorter."""
        return self._client.request_tokens(item.criterion.longest_call(bare), item.setting)

    def _scored(self, group: Group, texts: list[str], results: Sequence[CriterionScores]) -> Group:
        """The group with scores for all its candidates, duplicates sharing theirs."""
        place = {text: i for i, text in enumerate(texts)}
        order = [place[valid_unicode(candidate.text)] for candidate in group.candidates]
        total = np.zeros(len(texts))
        alone = len(self._criteria) == 1
        for item, result in zip(self._criteria, results, strict=True):
            scale = self._settings.likelihood_scale
            total += item.weight * comparable(item.criterion.name, result.scores, alone, scale)
        named = list(zip((item.criterion.name for item in self._criteria), results, strict=True))
        return replace(
            group,
            scores=[float(total[i]) for i in order],
            criterion_scores={name: [result.scores[i] for i in order] for name, result in named},
            votes={name: [result.votes[i] for i in order] for name, result in named},
            verdicts={name: result.verdicts([order.index(i) for i in range(len(texts))]) for name, result in named},
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
            if item.setting not in self._audits:
                continue
            full = await self._ask_criterion(self._audits[item.setting], item.setting, sheet, deadline)
            if full.missing is None:
                name = item.criterion.name
                self._counts[f"audit/{name}/groups"] += 1
                self._counts[f"audit/{name}/same-best"] += int(np.argmax(full.scores) == np.argmax(result.scores))
                self._counts[f"audit/{name}/same-worst"] += int(np.argmin(full.scores) == np.argmin(result.scores))

    def _count_verdicts(self, name: str, result: CriterionScores) -> None:
        self._counts[f"verdicts/{name}"] += result.received
        self._counts[f"verdicts-missing/{name}"] += result.planned - result.received
        if result.history is not None and result.history.first.size:
            self._counts[f"first-shown-preferred/{name}"] += float(result.history.outcome.sum())  # type: ignore[assignment]
