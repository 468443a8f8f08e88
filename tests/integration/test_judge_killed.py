"""kill -9 of a real judge server in the middle of a step."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from workers import kill_server

from megatron_sip.judge import ClientSettings, Endpoint, Judge, JudgeSettings
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.serving.launch import LocalServer, ServerSettings

GROUPS, CANDIDATES, IN_FLIGHT = 160, 6, 4
ANSWERED = '"POST /generate HTTP/1.1" 200'


@pytest.fixture(scope="module")
def victim(tiny_llama_dir: Path) -> Iterator[LocalServer]:
    """A judge of this module's own, on a port that it keeps when it is started again."""
    settings = ServerSettings(
        tiny_llama_dir,
        dtype="float32",
        max_total_tokens=8192,
        extra_args=("--log-level-http=info",),  # a line for each request: the tests count them
    )
    with LocalServer(settings) as server:
        yield server
        kill_server(server)


def make_groups(first: int) -> list[Group]:
    """Tasks that nobody has judged before, all texts different."""
    groups = []
    for index in range(first, first + GROUPS):
        texts = [f" version {k} of the text about number {index} and {k * k}." for k in range(CANDIDATES)]
        task = Task(index, [1], [1], f"Chapter {index}. Once upon a time there was a number, {index}, with a", texts[0])
        groups.append(Group(task, [Candidate("rollout", [1], text) for text in texts]))
    return groups


def make_settings(folder: Path, cache: Path, *servers: LocalServer) -> JudgeSettings:
    return JudgeSettings(
        criteria={"likelihood": 1.0},
        client=ClientSettings(
            tuple(Endpoint(server.url) for server in servers), str(folder), cache, concurrency=IN_FLIGHT
        ),
        deadline_s=300.0,
    )


async def kill_in_mid_step(judge: Judge, victim: LocalServer, answered: int) -> None:
    """SIGKILL to the server and all its processes once so many requests are answered."""
    while judge.counters().get("requests", 0.0) < answered:
        await asyncio.sleep(0.005)
    assert victim.pid is not None
    os.killpg(victim.pid, signal.SIGKILL)


async def test_the_only_judge_is_waited_for_and_nothing_is_judged_twice(
    victim: LocalServer, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings, groups = make_settings(tiny_llama_dir, tmp_path / "cache.sqlite", victim), make_groups(0)
    async with Judge(settings) as judge:
        await judge.check()
        step = asyncio.create_task(judge.score(groups))
        await kill_in_mid_step(judge, victim, GROUPS // 4)
        await asyncio.sleep(1.0)
        assert not step.done()
        before = judge.counters()["requests"]
        served = victim.log_file.read_text(errors="replace").count(ANSWERED)
        victim.stop()
        await asyncio.to_thread(victim.start)
        judged = await step
        counters = judge.counters()
    assert all(group.dropped is None and group.scores is not None for group in judged)
    assert GROUPS // 4 <= before < GROUPS
    assert counters["requests"] == GROUPS  # one request a group was answered: none of them twice
    assert counters["failed-attempts/connection"] + counters.get("failed-attempts/disconnected", 0.0) > 0
    served += victim.log_file.read_text(errors="replace").count(ANSWERED)
    assert GROUPS <= served <= GROUPS + IN_FLIGHT  # at most those that were on the wire when it died
    async with Judge(settings) as resumed:
        await resumed.check()
        assert await resumed.score(groups) == judged
        assert resumed.counters()["cached"] == GROUPS * CANDIDATES
        assert resumed.counters().get("requests", 0.0) == 0.0


async def test_the_step_completes_on_the_other_judge(
    victim: LocalServer, tiny_llama_server: LocalServer, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings = make_settings(tiny_llama_dir, tmp_path / "cache.sqlite", victim, tiny_llama_server)
    groups = make_groups(GROUPS)
    async with Judge(settings) as judge:
        await judge.check()
        step = asyncio.create_task(judge.score(groups))
        await kill_in_mid_step(judge, victim, GROUPS // 4)
        judged = await step
        counters = judge.counters()
    assert not victim.alive()
    assert all(group.dropped is None and group.scores is not None for group in judged)
    assert counters["requests"] == GROUPS
    assert counters["failovers"] > 0
    alone = make_settings(tiny_llama_dir, tmp_path / "cache.sqlite", tiny_llama_server)
    async with Judge(alone) as resumed:
        await resumed.check()
        await resumed.score(groups)
        assert resumed.counters().get("requests", 0.0) == 0.0
