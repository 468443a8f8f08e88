"""Single questions to a judge: what a server did not answer failed, and is no verdict that could not be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge

from megatron_sip.judge.exam import Exam, ExamSettings, Question, Reply
from megatron_sip.judge.settings import ClientSettings, Endpoint, VerdictMode

QUESTION = Question("safety", {"prefix": "p", "reference": "", "candidate": "c"})


async def ask(url: str, cache: Path, votes: int, mode: VerdictMode = "hard", *, prefill: bool = False) -> Reply:
    client = ClientSettings((Endpoint(url, "openai", prefill=prefill),), cache_path=cache)
    async with Exam(ExamSettings(client, mode, votes), ["safety"]) as exam:
        await exam.check(5.0)
        [reply] = await exam.ask([QUESTION])
        return reply


@pytest.mark.parametrize("votes", [1, 4])
async def test_an_aborted_verdict_failed_and_is_asked_for_again(tmp_path: Path, votes: int) -> None:
    def edits(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0]["finish_reason"] = finish
        return reply

    async with FakeJudge(edits=edits) as judge:
        finish = "abort"
        assert await ask(judge.url, tmp_path / "cache", votes) == Reply(failed="aborted")
        finish = "stop"
        assert await ask(judge.url, tmp_path / "cache", votes) == Reply((1.0,) * votes)


async def test_a_soft_verdict_that_was_aborted_failed(tmp_path: Path) -> None:
    def edits(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0]["finish_reason"] = "abort"
        return reply

    async with FakeJudge(edits=edits) as judge:
        for prefill in (False, True):
            reply = await ask(judge.url, tmp_path / "cache", 1, "soft", prefill=prefill)
            assert reply == Reply(failed="aborted")


async def test_what_nobody_can_read_is_unread_in_a_second_run_too(tmp_path: Path) -> None:
    def edits(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0]["message"]["content"] = "Hard to say."
        return reply

    async with FakeJudge(edits=edits) as judge:
        for _ in range(2):
            assert await ask(judge.url, tmp_path / "cache", 4) == Reply((1.0,) * 3, unread=1)
