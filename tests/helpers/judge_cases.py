"""Groups and settings that the judge's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from megatron_sip.judge import ClientSettings, Endpoint, Judge, JudgeSettings, ScheduleSettings
from megatron_sip.records import Candidate, Group, Task


def make_group(index: int, qualities: list[float], unsafe: frozenset[int] = frozenset()) -> Group:
    """A task with one candidate a quality; the first is the suffix, those in `unsafe` are marked so."""
    texts = [f" goes on with q={q}{' and is unsafe' if i in unsafe else ''}" for i, q in enumerate(qualities)]
    kinds = ["suffix", *["rollout"] * (len(texts) - 1)]
    candidates = [Candidate(kind, [i + 1], text) for i, (kind, text) in enumerate(zip(kinds, texts, strict=True))]
    return Group(Task(index, [1, 2], [1], f"Document {index} begins here and", texts[0]), candidates)


def make_settings(*urls: str, **changes: Any) -> JudgeSettings:
    """A hard quality judge over all pairs with one vote, quick to give up; changes may be of its client, too."""
    client: dict[str, Any] = {
        "endpoints": tuple(Endpoint(url, "openai") for url in urls),
        "call_timeout_s": 30.0,
        "concurrency": 64,
    }
    values: dict[str, Any] = {
        "criteria": {"quality": 1.0},
        "votes": 1,
        "default_verdict": "hard",
        "schedule": ScheduleSettings("all_pairs"),
        "deadline_s": 10.0,
        "audit_rate": 0.0,
    }
    return settings_of(values | client | changes)


def settings_of(values: dict[str, Any]) -> JudgeSettings:
    """JudgeSettings from its fields and those of its client in one dict."""
    names = {field.name for field in fields(ClientSettings)}
    client = ClientSettings(**{name: value for name, value in values.items() if name in names})
    return JudgeSettings(client=client, **{name: value for name, value in values.items() if name not in names})


async def score(judge_settings: JudgeSettings, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
    """The groups as a judge of these settings leaves them, and what it counted."""
    async with Judge(judge_settings) as judge:
        await judge.check(5.0)
        return await judge.score(groups), judge.counters()
