"""A judge that answers nobody any more ends the step, which is repeated; one that answers anything goes on."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_judge import FakeJudge, truthful_answer
from judge_cases import make_group, make_settings

from megatron_sip.experience.leader import CONNECT_SECONDS, ClientsSettings, Leader
from megatron_sip.experience.maker import ExperienceSettings
from megatron_sip.experience.selection import SelectionSettings
from megatron_sip.judge import Judge
from megatron_sip.judge.calls import GenerateCall
from megatron_sip.judge.probe import EndpointError
from megatron_sip.judge.teacher import TeacherClient
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.loop_thread import LoopThread
from megatron_sip.serving.patience import longest_wait
from megatron_sip.stop_signal import StopSignal

GROUPS = [make_group(index, [0.2, 0.8]) for index in range(4)]
PROBE_S = 0.3


def answer(prompt: str) -> str:
    """Also to what is no judgement."""
    return truthful_answer(prompt) if "the code" in prompt else "1"


@pytest.mark.parametrize("how", ["hangs", "is stopped"])
async def test_a_judge_that_answers_nobody_any_more_is_gone_until_it_answers_again(how: str) -> None:
    hangs = asyncio.Event()
    server = await FakeJudge(lambda index: "hang" if hangs.is_set() else None, answer).start()
    async with Judge(make_settings(server.url, deadline_s=1.0, call_timeout_s=5.0)) as judge:
        await judge.check(5.0)
        assert all(group.dropped is None for group in await judge.score(GROUPS))
        assert await judge.gone() is None
        if how == "hangs":
            hangs.set()
        else:
            await server.stop()
        judged = await judge.score(GROUPS)
        assert {group.dropped for group in judged} <= {"judge-quality-deadline", "judge-quality-timeout"}
        assert await judge._client.gone(PROBE_S) == f"the teacher at {server.url} answers no more"
        hangs.clear()
        if how == "is stopped":
            await server.start()
        assert await judge.gone() is None
    await server.stop()


async def test_a_judge_that_only_some_prompts_hang_is_not_gone() -> None:
    hangs = asyncio.Event()
    hangs.set()
    server = await FakeJudge(lambda index: "hang" if hangs.is_set() else None, answer).start()
    async with Judge(make_settings(server.url, deadline_s=0.4, attempts=1)) as judge:
        await judge.check(5.0)
        [judged] = await judge.score(GROUPS[:1])
        assert judged.dropped is not None
        assert judge._client.pool.unanswered
        hangs.clear()
        assert await judge.gone() is None
    await server.stop()


async def test_a_judge_that_is_slow_is_not_gone() -> None:
    """One that has answered is not asked again at once, and has as long for that as for any other answer."""
    timeouts: list[float] = []

    async def silent(*_: Any, timeout_s: float) -> None:
        timeouts.append(timeout_s)
        raise RequestError("timeout", "too slow")

    async with Judge(make_settings("http://judge:1", deadline_s=600.0, call_timeout_s=300.0)) as judge:
        pool = judge._client.pool
        vars(pool)["call"] = silent
        pool.unanswered, pool.answered_at = True, asyncio.get_running_loop().time() - 300.0
        assert await judge.gone() is None
        assert not timeouts
        pool.answered_at -= 300.0
        assert await judge.gone() is not None
        assert timeouts == [300.0]


@pytest.mark.parametrize("tells", [True, False])
async def test_while_nobody_answers_it_is_said_again_and_again_for_how_long(
    tells: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeJudge(lambda index: "hang") as server:
        client = make_settings(server.url).client
        assert client is not None
        own = replace(client, call_timeout_s=60.0, tells=tells)
        async with TeacherClient(own, silence_s=1.0, report_s=0.2) as teacher:
            call = GenerateCall("x", ("prompt",), 1, 8, 1.0, 1.0)
            assert await teacher.ask([call], None, longest_wait(asyncio.get_running_loop().time(), 1.0)) == [None]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting")]
    if not tells:
        assert not lines
        return
    assert len(lines) >= 2
    assert re.match(rf"waiting for the teacher at {server.url}: no answer for [01] s of 1", lines[0])


@pytest.mark.parametrize("tells", [True, False])
async def test_at_the_start_those_that_are_missing_are_named_in_one_line(
    tells: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sip.judge.teacher.FIRST_REPORT_SECONDS", 0.6)
    async with FakeJudge() as server:
        client = make_settings(server.url).client
        assert client is not None
        missing = [f"http://127.0.0.1:{port}" for port in range(1, 6)]
        async with TeacherClient(replace(client.at([server.url, *missing]), tells=tells)) as teacher:
            with pytest.raises(EndpointError, match="gave no good answer"):
                await teacher.check(1.4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting")]
    told = f"waiting for the teacher at {', '.join(missing[:3])} and 2 others: 1 s of 1"
    assert lines == ([told] if tells else [])


def test_of_all_leaders_the_first_says_who_is_waited_for(loop: LoopThread) -> None:
    server = loop.run(FakeJudge().start())
    tokenizer: Any = SimpleNamespace(eos_token_id=0)
    experience = ExperienceSettings(
        ("suffix",), SamplingSettings(2, n=1), SelectionSettings(objective="rf-nll", candidates=("suffix",))
    )
    for replica in (0, 1):
        leader = Leader(ClientsSettings(judge=make_settings(server.url)), experience, tokenizer, replica)
        assert leader.judge is not None
        assert leader.judge._client.settings.tells == (replica == 0)
        leader.close()
    loop.run(server.stop())


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("judge")
    yield loop
    loop.close()


def test_a_leader_whose_judge_is_gone_asks_the_run_to_stop_and_makes_no_experience(loop: LoopThread) -> None:
    server = loop.run(FakeJudge(answer=answer).start())
    tokenizer: Any = SimpleNamespace(eos_token_id=0, decode=lambda ids, **_: "")
    judge = make_settings(server.url, criteria={"safety": 1.0}, deadline_s=1.0, call_timeout_s=5.0)
    experience = ExperienceSettings(
        ("suffix",), SamplingSettings(2, n=1), SelectionSettings(objective="rf-nll", candidates=("suffix",))
    )
    tasks = [Task(0, [1, 10], [4], "A document begins and", " goes on")]
    leader = Leader(ClientsSettings(judge=judge), experience, tokenizer)
    try:
        stop = StopSignal()
        group = Group(tasks[0], [Candidate("suffix", [4], " goes on"), Candidate("rollout", [5], " ends")])
        leader.apart(leader.judge.score([group]))
        made = leader.wait(leader.begin_experience(0, "0", tasks, [], stop))
        assert made is not None
        assert made.metrics["judge/calls"] == 1.0, "of the step's own suffix alone"
        assert not stop.requested
        assert leader.judged(asyncio.sleep(0, "numbers"), stop, leader.judge, None) == "numbers"
        loop.run(server.stop())
        assert leader.wait(leader.begin_experience(1, "1", tasks, [], stop)) is None
        assert stop.reason == f"the teacher at {server.url} answers no more"
        measuring = StopSignal()  # of a validation or comparison
        assert leader.judged(asyncio.sleep(0, "numbers"), measuring, leader.judge, None) is None
        assert measuring.reason == stop.reason
    finally:
        leader.close()


def test_a_run_that_goes_on_waits_for_its_judge_as_long_as_in_a_step() -> None:
    judge = make_settings("http://judge:1", deadline_s=900.0)
    assert ClientsSettings(judge=judge).patience_s(judge) == CONNECT_SECONDS
    assert ClientsSettings(judge=judge, goes_on=True).patience_s(judge) == 900.0
    assert ClientsSettings(judge=judge, goes_on=True).patience_s(replace(judge, deadline_s=1.0)) == CONNECT_SECONDS
