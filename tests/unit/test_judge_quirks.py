"""Chat APIs that refuse a parameter: the request is sent as they want it, once learnt for the whole run."""

from __future__ import annotations

from typing import Any

import pytest
from fake_judge import FakeJudge, truthful_answer
from judge_cases import make_group, make_settings

from megatron_sip.judge import Judge, ScheduleSettings
from megatron_sip.judge.wire import quirk_in

MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
NO_LOGPROBS = "You are not allowed to request logprobs from this model: 'logprobs' is not supported with this model."


def reasoning_model(body: dict[str, Any]) -> str | None:
    if "max_tokens" in body:
        return MAX_TOKENS
    return NO_LOGPROBS if "logprobs" in body else None


@pytest.mark.parametrize(
    ("message", "quirk"),
    [
        (MAX_TOKENS, "max_completion_tokens"),
        (NO_LOGPROBS, "no-logprobs"),
        ("Unsupported parameter: 'logprobs'", "no-logprobs"),
        ("max_tokens is too large: 99999", None),
        ("This model's maximum context length is 8192 tokens", None),
    ],
)
def test_refusals_are_understood(message: str, quirk: str | None) -> None:
    assert quirk_in(message) == quirk


@pytest.mark.parametrize("verdict", ["hard", "soft"])
async def test_a_reasoning_model_is_asked_as_it_wants(verdict: Any) -> None:
    settings_changes = {"default_verdict": verdict, "schedule": ScheduleSettings("all_pairs"), "concurrency": 2}
    async with FakeJudge(refuses=reasoning_model) as server:
        async with Judge(make_settings(server.url, **settings_changes)) as judge:
            await judge.check(5.0)
            judged = await judge.score([make_group(i, [0.4, 0.9, 0.1]) for i in range(20)])
        assert all(group.scores == pytest.approx([0.5, 1.0, 0.0]) for group in judged)
        refused = [body for body in server.bodies if reasoning_model(body)]
        assert 1 <= len(refused) <= 4  # at most what was in flight before the first refusals were read
        assert server.bodies[-1]["max_completion_tokens"] == 512


async def test_a_server_that_goes_on_refusing_is_not_asked_for_ever() -> None:
    async with FakeJudge(answer=truthful_answer, refuses=lambda body: MAX_TOKENS) as server:
        async with Judge(make_settings(server.url)) as judge:
            [judged] = await judge.score([make_group(0, [0.4, 0.9])])
        assert judged.dropped == "judge-quality-rejected"
        assert server.requests == 2
