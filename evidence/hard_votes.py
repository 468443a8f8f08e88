"""Hard votes of a small judge on recorded groups: the paper's protocol (section 3.2), asked.

A judge that was trained on soft verdicts writes no reasons: its answer is begun up to the label, as in its training, and the
label alone is sampled. Schedule, orders and win rates are those of `Pairwise`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_sip.judge import JudgeSettings
from megatron_sip.judge.calls import Answer, Call, ChoiceCall, GenerateCall
from megatron_sip.judge.catalogue import make_criterion
from megatron_sip.judge.criteria import Criterion, CriterionScores, Sheet
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.prompts import fence_code, valid_unicode
from megatron_sip.judge.wire import prompt_ids
from megatron_sip.records import Group
from megatron_sip.rollout.pool import PoolSettings, SGLangPool
from megatron_sip.rollout.sampling import Failure, SamplingSettings


async def voted(groups: Sequence[Group], how: JudgeSettings) -> dict[str, Any]:
    """Scores and votes of each group by its one criterion; votes asked as "calls", the tokens of their prompts (those of one
    question share it), seconds. A group that lacks votes has None as its scores."""
    assert how.client is not None
    assert how.client.tokenizer is not None
    [name] = how.criteria
    criterion = make_criterion(name, how)
    client = PoolSettings(call_timeout_s=how.client.call_timeout_s, deadline_s=how.deadline_s)
    async with SGLangPool([endpoint.url for endpoint in how.client.endpoints], client) as pool:
        asking = _Asking(pool, ChatEncoder.load(how.client.tokenizer))
        criterion.check(asking.encoder)
        await pool.wait_ready()
        started = time.monotonic()
        results = await asyncio.gather(*(_scored(criterion, group, how, asking) for group in groups))
        seconds = time.monotonic() - started
        failures = {f"failed/{kind}": count for kind, count in pool.counters.failures.items()}
    return {
        "kinds": [[candidate.kind for candidate in group.candidates] for group in groups],
        "scores": [None if None in found.scores else list(found.scores) for found in results],
        "verdicts": [found.verdicts({i: i for i in range(len(found.scores))}) for found in results],
        "calls": asking.counts["calls"],
        "prompt_tokens": asking.counts["prompt-tokens"],
        "seconds": round(seconds, 2),
        "counters": {**asking.counts, **failures},
    }


class _Asking:
    """Samples the label of each vote. counts: votes asked and votes that were no label, tokens of prompts."""

    def __init__(self, pool: SGLangPool, encoder: ChatEncoder) -> None:
        self.encoder = encoder
        self.counts: Counter[str] = Counter()
        self._pool = pool

    async def ask(self, calls: Sequence[Call]) -> list[Answer]:
        return list(await asyncio.gather(*map(self._ask, calls)))

    async def _ask(self, call: Call) -> Answer:
        assert isinstance(call, GenerateCall)
        assert call.rule is not None
        prompt = prompt_ids(ChoiceCall(call.identity, call.prompt, call.rule), self.encoder)
        self.counts.update({"calls": call.n, "prompt-tokens": len(prompt)})
        _, labels = self.encoder.choices(call.rule.start, call.rule.labels)
        values = dict(zip(labels, call.rule.values.values(), strict=True))
        [found] = await self._pool.generate([prompt], SamplingSettings(1, call.temperature, call.top_p, call.n))
        if isinstance(found, Failure):
            return None
        votes = [values.get(one.ids[0]) for one in found]
        self.counts["no-label"] += votes.count(None)
        return votes


async def _scored(criterion: Criterion, group: Group, how: JudgeSettings, asking: _Asking) -> CriterionScores:
    texts = [valid_unicode(candidate.text) for candidate in group.candidates]
    prefix, original = valid_unicode(group.task.prefix_text), valid_unicode(group.task.suffix_text)
    sheet = Sheet(
        prefix=prefix,
        original=original,
        candidates=tuple(texts),
        kinds=tuple(candidate.kind for candidate in group.candidates),
        code=fence_code(how.seed, prefix, [*texts, original]),
        seed=(how.seed, group.task.index),
        objective="dpo",
        number=group.task.index,
    )
    return await criterion.score(sheet, asking.ask)
