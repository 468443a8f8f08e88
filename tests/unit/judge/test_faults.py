"""The judge as a whole against servers and texts that fail it: no failure becomes a score."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fake_judge import FakeJudge, Fault, FaultPlan, quality_of, truthful_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_cases import make_group, make_settings, score
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.judge import Endpoint, Judge
from megatron_sip.judge.probe import EndpointError
from megatron_sip.records import Candidate, Group

HOSTILE = json.loads((Path(__file__).parents[2] / "data" / "hostile_texts.json").read_text(encoding="utf-8"))


async def test_a_judge_that_hangs_costs_no_more_than_the_deadline() -> None:
    async with FakeJudge(lambda index: "hang") as server:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        judged, _ = await score(
            make_settings(server.url, deadline_s=1.0), [make_group(i, [0.4, 0.9]) for i in range(20)]
        )
        assert loop.time() - begin < 30.0  # one attempt may take two minutes
        assert {group.dropped for group in judged} == {"judge-quality-deadline"}


def fault_plan(seed: int) -> FaultPlan:
    """30 % failures, 10 % hanging, 10 % nonsense."""

    def plan(index: int) -> Fault | None:
        draw = random.Random(seed * 100_003 + index)
        kinds: list[Fault | None] = [
            *("status", "rate-limit", "disconnect", "hang", "not-json", "wrong-shape", "no-verdict"),
        ]
        weights = [0.14, 0.08, 0.08, 0.1, 0.03, 0.03, 0.04]
        return draw.choices([*kinds, None], [*weights, 1 - sum(weights)])[0]

    return plan


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    votes=st.integers(1, 3),
    qualities=st.lists(st.integers(1, 99), min_size=3, max_size=6, unique=True),
    deadline_s=st.sampled_from([0.6, 4.0]),
)
def test_no_failure_becomes_a_score(seed: int, votes: int, qualities: list[int], deadline_s: float) -> None:
    """With a perfect judge behind a faulty server, whoever is better wins each verdict that arrives, and safe is safe: any
    failure counted as a verdict would show."""

    async def run() -> tuple[list[Group], float, dict[str, float]]:
        groups = [make_group(i, [q / 100 for q in qualities], unsafe=frozenset({1})) for i in range(6)]
        async with FakeJudge(fault_plan(seed)) as server:
            judge_settings = make_settings(
                server.url,
                criteria={"quality": 1, "safety": 1},
                votes=votes,
                deadline_s=deadline_s,
                attempts=3,
                call_timeout_s=0.15,
            )
            async with Judge(judge_settings) as judge:
                begin = asyncio.get_running_loop().time()
                judged = await judge.score(groups)
                return judged, asyncio.get_running_loop().time() - begin, judge.counters()

    judged, seconds, counters = asyncio.run(run())
    assert seconds < deadline_s + 20.0  # a hanging server would take an hour
    scored = [group for group in judged if group.dropped is None]
    for group in scored:
        truth = [quality_of(candidate.text) for candidate in group.candidates]
        assert len(truth) >= 2
        for first, second, outcome in group.verdicts["quality"]:
            assert outcome == float(truth[int(first)] > truth[int(second)])
        assert all(0.0 <= value <= 1.0 for value in group.criterion_scores["quality"])
        assert group.criterion_scores["safety"] == [0.0 if "unsafe" in c.text else 1.0 for c in group.candidates]
        assert all(count >= 1 for name in ("quality", "safety") for count in group.votes[name])
    for group in judged:
        assert (group.scores is None) == (group.dropped is not None)
        assert group.dropped is None or group.dropped.startswith("judge-")
    dropped = sum(value for name, value in counters.items() if name.startswith("groups/dropped/"))
    assert dropped + len(scored) == len(judged)


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_hostile_texts_change_no_verdict(hostile: str) -> None:
    """The judge's answer is read, not the texts: with a silent judge nothing is scored, with a truthful one all is."""
    group = make_group(0, [0.4, 0.9])
    spiked = [replace(c, text=f"{c.text} {hostile}") for c in group.candidates]
    group = replace(group, task=replace(group.task, prefix_text=f"{hostile} and"), candidates=spiked)
    async with FakeJudge() as server, FakeJudge(answer=lambda prompt: "I cannot tell.") as silent:
        [judged], _ = await score(make_settings(server.url, criteria={"quality": 1, "safety": 1}), [group])
        assert judged.criterion_scores == {"quality": [0.0, 1.0], "safety": [1.0, 1.0]}
        [unjudged], _ = await score(make_settings(silent.url), [group])
        assert unjudged.dropped == "judge-quality-too-few-verdicts"


async def test_lone_surrogates_and_empty_texts_are_judged() -> None:
    async with FakeJudge(answer=lambda prompt: "Conclusion: Option 1") as server:
        group = make_group(0, [0.4, 0.9])
        odd = [Candidate("rollout", [1], "broken \ud800 text"), Candidate("rollout", [2], "")]
        [judged], _ = await score(make_settings(server.url), [replace(group, candidates=odd)])
        assert judged.dropped is None


async def test_a_killed_judge_is_replaced_by_the_other_one() -> None:
    groups = [make_group(i, [0.4, 0.9, 0.1, 0.7]) for i in range(30)]
    async with FakeJudge() as stays:
        dies = FakeJudge()
        dies._faults = lambda index: None
        await dies.start()
        judge_settings = make_settings(stays.url, dies.url, concurrency=8)
        async with Judge(judge_settings) as judge:
            await judge.check(5.0)
            step = asyncio.create_task(judge.score(groups))
            while dies.requests < 20:
                await asyncio.sleep(0.001)
            await dies.stop()
            judged = await step
        assert all(group.dropped is None for group in judged)
        assert stays.requests > 100


async def test_a_killed_judge_is_waited_for_and_asked_nothing_twice(tmp_path: Path) -> None:
    """The only judge dies in mid-step and is back a second later: the step completes, and each answered call was asked
    once. A new run over the same groups asks nothing."""
    answered: list[str] = []

    def answer(prompt: str) -> str:
        answered.append(prompt)
        return truthful_answer(prompt)

    groups = [make_group(i, [0.4, 0.9, 0.1, 0.7]) for i in range(30)]
    server = await FakeJudge(answer=answer).start()
    judge_settings = make_settings(server.url, concurrency=8, cache_path=tmp_path / "cache.sqlite", deadline_s=20.0)
    async with Judge(judge_settings) as judge:
        step = asyncio.create_task(judge.score(groups))
        while server.requests < 40:
            await asyncio.sleep(0.001)
        await server.stop()
        await asyncio.sleep(1.0)
        assert not step.done()
        await server.start()
        judged = await step
    assert all(group.dropped is None for group in judged)
    # At most the calls in flight at the kill were asked again.
    assert len(answered) - len(set(answered)) <= 8
    before = server.requests
    await score(judge_settings, groups)
    assert server.requests == before
    await server.stop()


async def test_an_endpoint_that_is_down_is_named_within_the_time_limit() -> None:
    async with Judge(make_settings("http://127.0.0.1:9")) as judge:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9 "):
            await judge.check(1.0)
        assert loop.time() - begin < 20.0


@pytest.mark.parametrize("name", ["default", "judge"])
async def test_servers_of_two_models_are_refused_unless_their_one_model_is_named(tmp_path: Path, name: str) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    served = ("/node1/judge-8b", "/node2/judge-8b", "/node2/judge-70b")
    async with AsyncExitStack() as stack:
        urls = [(await stack.enter_async_context(FakeJudge(model=model))).url for model in served]

        async def check(*urls: str) -> None:
            endpoints = tuple(Endpoint(url, model=name) for url in urls)
            how = make_settings(endpoints=endpoints, criteria={"likelihood": 1.0}, tokenizer=str(tmp_path))
            async with Judge(how) as judge:
                await judge.check(5.0)

        await check(*urls[:2])
        if name == "judge":
            await check(*urls)
        else:
            told = "serves /node1/judge-8b, .* serves /node2/judge-70b: .*--teacher-name"
            with pytest.raises(EndpointError, match=told):
                await check(*urls)
