"""Groups and settings that the judge's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sip.judge import Endpoint, JudgeSettings, ScheduleSettings
from megatron_sip.samples import Candidate, Group, Task


def make_group(index: int, qualities: list[float], unsafe: frozenset[int] = frozenset()) -> Group:
    """A task with one candidate a quality; the first is the suffix, those in `unsafe` are marked so."""
    texts = [f" goes on with q={q}{' and is unsafe' if i in unsafe else ''}" for i, q in enumerate(qualities)]
    kinds = ["suffix", *["rollout"] * (len(texts) - 1)]
    candidates = [Candidate(kind, [i + 1], text) for i, (kind, text) in enumerate(zip(kinds, texts, strict=True))]
    return Group(Task(index, [1, 2], [1], f"Document {index} begins here and", texts[0]), candidates)


def make_settings(*urls: str, cache_path: Path | None = None, **changes: Any) -> JudgeSettings:
    """A hard quality judge over all pairs with one vote, quick to give up."""
    values: dict[str, Any] = {
        "criteria": {"quality": 1.0},
        "endpoints": tuple(Endpoint(url, "openai") for url in urls),
        "votes": 1,
        "default_verdict": "hard",
        "schedule": ScheduleSettings("all_pairs"),
        "deadline_s": 10.0,
        "call_timeout_s": 0.3,
        "concurrency": 64,
        "cache_path": cache_path,
        "audit_rate": 0.0,
    }
    return JudgeSettings(**(values | changes))
