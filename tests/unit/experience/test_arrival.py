"""Groups are judged as their candidates arrive, whatever others wait for; what comes of it does not depend on the order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fake_judge import FakeJudge
from judge_cases import make_group, make_settings

from megatron_sip.experience import arrival
from megatron_sip.experience.arrival import ArrivalClock
from megatron_sip.experience.maker import Experience, ExperienceMaker, ExperienceSettings
from megatron_sip.experience.selection import SelectionSettings
from megatron_sip.judge import Judge, JudgeSettings, ScheduleSettings
from megatron_sip.records import Group, Task
from megatron_sip.rollout.pool import PoolCounters
from megatron_sip.rollout.sampling import Completion, SamplingSettings
from megatron_sip.serving.patience import longest_wait

QUALITIES = [[0.1, 0.7, 0.4, 0.9], [0.8, 0.2, 0.3], [0.5, 0.6, 0.1, 0.3, 0.2]]
GROUPS = [make_group(index, QUALITIES[index % 3], frozenset([index % 3])) for index in range(12)]
SECONDS = 20.0
"""A test that waits for what never comes ends."""


@pytest.mark.parametrize("seed", range(3))
async def test_groups_in_any_order_of_arrival_get_the_verdicts_and_questions_of_groups_that_are_all_there(
    seed: int,
) -> None:
    async with FakeJudge() as server:
        settings = make_settings(
            server.url, criteria={"quality": 1.0, "safety": 1.0}, votes=2, audit_rate=0.5, call_timeout_s=30.0
        )
        async with Judge(settings) as judge:
            await judge.check(5.0)
            at_once = await judge.score(GROUPS)
            asked, server.prompts = sorted(server.prompts), []
            order = random.Random(seed).sample(range(len(GROUPS)), len(GROUPS))
            gates = [asyncio.Event() for _ in GROUPS]

            async def arriving(place: int) -> Group:
                await gates[place].wait()
                return GROUPS[place]

            work = asyncio.create_task(judge.score_on_arrival([arriving(place) for place in range(len(GROUPS))]))
            for place in order:
                gates[place].set()
                await asyncio.sleep(0.002 * (place % 3))
            assert await work == at_once
    assert sorted(server.prompts) == asked


async def test_a_group_is_judged_while_others_are_yet_to_come_and_has_its_time_from_its_own_arrival() -> None:
    async with FakeJudge() as server, Judge(make_settings(server.url, deadline_s=2.0)) as judge:
        await judge.check(5.0)
        judged = asyncio.Event()

        async def here() -> Group:
            return GROUPS[0]

        async def late() -> Group:
            await judged.wait()  # for ever, were the first group to wait for this one
            await asyncio.sleep(2.2)
            return GROUPS[1]

        async with asyncio.timeout(SECONDS):
            found = await judge.score_on_arrival([late(), here()], progress=lambda _: judged.set())
    assert [(group.task.index, group.dropped) for group in found] == [(1, None), (0, None)]


class Deadlines(Judge):
    """Notes those of its groups; the first eight, which fill its gate, are scored when `answered` is set."""

    def __init__(self, settings: JudgeSettings, answered: asyncio.Event) -> None:
        super().__init__(settings)
        self.deadlines: list[float] = []
        self._waited_for = answered

    async def _score_group(self, group: Group, objective: Any, deadline: float) -> Group:
        self.deadlines.append(deadline)
        await self._waited_for.wait()
        return group


@pytest.mark.parametrize("source", ["a server", "a function", "nobody"])
async def test_to_wait_for_groups_that_are_answered_is_no_silence(source: str) -> None:
    """Nobody has been asked about a group yet whose turn has not come: neither function nor server."""
    criteria, answered = {"quality": 1.0, "criterion_functions:quality": 1.0}, asyncio.Event()
    judge = Deadlines(make_settings("http://judge:1", criteria=criteria, deadline_s=1.0), answered)
    work = asyncio.create_task(judge.score(GROUPS[:9]))
    while len(judge.deadlines) < 8:
        await asyncio.sleep(0)
    now = asyncio.get_running_loop().time() + 0.5
    if source == "a server":
        judge._client.pool.answered_at = now
    elif source == "a function":
        judge._functions[0]._processes.answered_at = now
    answered.set()
    assert await work == GROUPS[:9]
    last = judge.deadlines.pop()
    if source == "nobody":
        assert last <= longest_wait(now - 0.5, 1.0)
    else:
        assert last == longest_wait(now, 1.0)


class Engines:
    """Answers a prefix when its gate is open."""

    def __init__(self, gates: dict[int, asyncio.Event]) -> None:
        self.counters = PoolCounters()
        self.gates = gates

    async def generate(
        self, prefixes: Sequence[list[int]], settings: Any, *, seeds: list[int] | None, weight_version: str
    ) -> list[Any]:
        [prefix] = prefixes
        await self.gates[prefix[-1]].wait()
        return [[Completion([prefix[-1], 7 + n], [-1.0, -2.0], "length", weight_version) for n in range(settings.n)]]


class Tokenizer:
    """Of one token a word; the judge's double reads its quality."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f" q=0.{token}" for token in ids[:2])


TASKS = [Task(index, [1, 10 + index], [4], f"Document {index} begins and", " q=0.55") for index in range(4)]


async def made_in(server: FakeJudge, order: Sequence[int]) -> tuple[Experience, list[int]]:
    """The experience of TASKS whose rollouts come one after the other, each when the group before is judged."""
    gates = {10 + index: asyncio.Event() for index in range(len(TASKS))}
    waiting, judged = list(order), []
    settings = ExperienceSettings(
        ("suffix", "rollout"), SamplingSettings(2, n=3), SelectionSettings(candidates=("suffix", "rollout"))
    )

    class Watched(Judge):
        async def _score_group(self, group: Group, *rest: Any) -> Group:
            scored = await super()._score_group(group, *rest)
            judged.append(group.task.index)
            if waiting:
                gates[10 + waiting.pop(0)].set()
            return scored

    async with Watched(
        make_settings(server.url, schedule=ScheduleSettings("circulant_bt"), call_timeout_s=30.0)
    ) as judge:
        await judge.check(5.0)
        making = ExperienceMaker(settings, Tokenizer(), Engines(gates), judge, None)  # type: ignore[arg-type]
        gates[10 + waiting.pop(0)].set()
        async with asyncio.timeout(SECONDS):
            return await making.make(0, TASKS), judged


async def test_experience_is_the_same_in_any_order_and_no_group_waits_for_another() -> None:
    async with FakeJudge() as server:
        first, judged = await made_in(server, [0, 1, 2, 3])
        assert judged == [0, 1, 2, 3]
        asked, server.prompts = sorted(server.prompts), []
        second, judged = await made_in(server, [2, 0, 3, 1])
        assert judged == [2, 0, 3, 1]
    assert [example.task_index for example in first.examples] == [0, 1, 2, 3]
    assert second.examples == first.examples
    assert sorted(server.prompts) == asked


def test_seconds_of_rollouts_and_of_what_judging_adds_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 3.0, 5.0, 6.0, 6.5, 9.0, 9.0])
    monkeypatch.setattr(arrival, "time", SimpleNamespace(monotonic=lambda: next(times)))
    clock = ArrivalClock()  # at 0
    clock.arrived()  # at 2, judged at 3
    clock.judged(1)
    clock.arrived()  # at 5
    clock.arrived()  # at 6, the last one
    clock.judged(1)
    clock.judged(1)  # at 6.5
    assert clock.seconds() == {"seconds/rollout": 6.0, "seconds/judge": 3.0, "seconds/judging": 2.5}
