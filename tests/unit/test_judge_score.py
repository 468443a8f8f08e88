"""The judge as a whole against an in-process server: scores, combinations, caching, failing servers."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_judge import FakeJudge, Fault, FaultPlan, quality_of, truthful_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_cases import make_group, make_settings
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.judge import Endpoint, Judge, JudgeSettings, ScheduleSettings
from megatron_sip.judge.client import EndpointError
from megatron_sip.samples import Candidate, Group, group_from_json

HOSTILE = json.loads((Path(__file__).parents[1] / "data" / "hostile_texts.json").read_text(encoding="utf-8"))


async def score(judge_settings: JudgeSettings, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
    async with Judge(judge_settings) as judge:
        await judge.check(5.0)
        return await judge.score(groups), judge.counters()


async def test_all_pairs_scores_are_win_rates() -> None:
    async with FakeJudge() as server:
        [group], counters = await score(make_settings(server.url), [make_group(0, [0.4, 0.9, 0.1, 0.6])])
        assert group.scores == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])
        assert group.criterion_scores == {"quality": group.scores}
        assert group.votes == {"quality": [3, 3, 3, 3]}
        assert group.dropped is None
        assert server.requests == counters["calls"] == counters["verdicts/quality"] == 6


async def test_criteria_are_summed_with_their_weights() -> None:
    async with FakeJudge() as server:
        judge_settings = make_settings(server.url, criteria={"quality": 1.0, "safety": 0.5}, votes=3)
        [group], _ = await score(judge_settings, [make_group(0, [0.4, 0.9, 0.1], unsafe=frozenset({1}))])
        assert group.criterion_scores == {"quality": [0.5, 1.0, 0.0], "safety": [1.0, 0.0, 1.0]}
        assert group.scores == pytest.approx([1.0, 1.0, 0.5])
        assert group.votes == {"quality": [8, 8, 8], "safety": [3, 3, 3]}  # of three, each pair twice in both orders


@pytest.mark.parametrize("name", ["all_pairs", "all_pairs_swap", "pivot", "circulant_bt", "two_ended_bt"])
async def test_every_schedule_finds_best_and_worst_of_a_perfect_judge(name: str) -> None:
    async with FakeJudge() as server:
        schedule = ScheduleSettings(name, degree=4, budget=24, pivot_competes=name == "pivot")
        judge_settings = make_settings(server.url, schedule=schedule)
        [group], _ = await score(judge_settings, [make_group(3, [0.5, 0.9, 0.1, 0.6, 0.3])])
        assert group.scores is not None
        assert max(group.scores) == group.scores[1]
        assert min(group.scores) == group.scores[2]


@pytest.mark.parametrize(("count", "votes"), [(2, [3, 3]), (4, [2, 3])])
async def test_votes_are_spread_over_both_orders(count: int, votes: list[int]) -> None:
    """An odd vote would leave the bias of a small group's orders as noise: there it gets a counterpart."""
    async with FakeJudge() as server:
        await score(make_settings(server.url, votes=5), [make_group(0, [0.4, 0.9, 0.5, 0.1][:count])])
        pairs = count * (count - 1) // 2
        assert sorted(body["n"] for body in server.bodies) == sorted(votes * pairs)
        assert len(set(server.prompts)) == 2 * pairs


async def test_each_verdict_is_recorded_with_the_order_it_was_shown_in() -> None:
    async with FakeJudge() as server:
        group = make_group(0, [0.4, 0.9, 0.1], unsafe=frozenset({2}))
        twin = replace(group, candidates=[group.candidates[0], *group.candidates])
        judge_settings = make_settings(server.url, criteria={"quality": 1.0, "safety": 1.0}, votes=3)
        [judged], _ = await score(judge_settings, [twin])
        quality = [0.4, 0.4, 0.9, 0.1]
        verdicts = judged.verdicts["quality"]
        assert len(verdicts) == 3 * 4
        for first, second, outcome in verdicts:
            assert outcome == float(quality[int(first)] > quality[int(second)])
        shown = {(first, second) for first, second, _ in verdicts}
        assert shown == {(a, b) for a in (0, 2, 3) for b in (0, 2, 3) if a != b}  # both orders; the twin is the first
        assert judged.verdicts["safety"] == [
            [place, value] for place, value in ((0, 1), (2, 1), (3, 0)) for _ in range(3)
        ]


async def test_a_judge_that_always_prefers_the_first_sees_a_tie() -> None:
    async with FakeJudge(answer=lambda prompt: "Conclusion: Option 1") as server:
        swap = make_settings(server.url, schedule=ScheduleSettings("all_pairs_swap"))
        [group], counters = await score(swap, [make_group(0, [0.4, 0.9, 0.1])])
        assert group.scores == [0.5, 0.5, 0.5]
        assert counters["first-shown-preferred/quality"] == 1.0


async def test_equal_texts_are_judged_once_and_tie() -> None:
    async with FakeJudge() as server:
        group = make_group(0, [0.4, 0.9])
        twin = replace(group, candidates=[*group.candidates, *group.candidates])
        [judged, alone], _ = await score(
            make_settings(server.url), [twin, replace(group, candidates=[group.candidates[0]] * 3)]
        )
        assert server.requests == 2  # one pair in both orders
        assert judged.scores == [0.0, 1.0, 0.0, 1.0]
        assert alone.scores == [0.5, 0.5, 0.5]
        assert alone.votes == {"quality": [0, 0, 0]}


async def test_a_resumed_step_asks_nothing_and_scores_the_same(tmp_path: Path) -> None:
    groups = [make_group(i, [0.4, 0.9, 0.1, 0.7]) for i in range(5)]
    async with FakeJudge() as server:
        judge_settings = make_settings(
            server.url,
            cache_path=tmp_path / "cache.sqlite",
            criteria={"quality": 1, "safety": 1},
            votes=2,
            schedule=ScheduleSettings("two_ended_bt", budget=12),
        )
        first, _ = await score(judge_settings, groups)
        asked = server.requests
        again, counters = await score(judge_settings, groups)
        assert server.requests == asked > 0
        assert again == first
        assert counters["cached-share"] == 1.0


async def test_another_wording_sampling_or_model_is_asked_anew(tmp_path: Path) -> None:
    group = make_group(0, [0.4, 0.9])
    async with FakeJudge() as server:
        judge_settings = make_settings(server.url, cache_path=tmp_path / "cache.sqlite")
        for changed in (
            judge_settings,
            replace(judge_settings, temperature=0.5),
            replace(judge_settings, votes=3),
            make_settings(endpoints=(Endpoint(server.url, "openai", "another"),), cache_path=tmp_path / "cache.sqlite"),
        ):
            before = server.requests
            await score(changed, [group])
            assert server.requests > before


async def test_another_model_at_the_same_address_is_asked_anew(tmp_path: Path) -> None:
    """Servers of one model need no name: what they report is what their answers are kept under."""
    byte_level_tokenizer().save_pretrained(tmp_path)
    asked = []
    for model in ("/models/a", "/models/b", "/models/a"):
        async with FakeJudge(model=model) as server:
            judge_settings = make_settings(
                endpoints=(Endpoint(server.url),),
                criteria={"likelihood": 1.0},
                tokenizer=str(tmp_path),
                cache_path=tmp_path / "cache.sqlite",
            )
            [judged], _ = await score(judge_settings, [make_group(0, [0.4, 0.9])])
            assert judged.dropped is None
            asked.append(server.requests)
    assert asked == [1, 1, 0]


async def test_the_likelihood_of_candidates_that_ended_is_that_of_their_ends_too(tmp_path: Path) -> None:
    """Equal texts of which one ended and one was cut are two; one that ended at once is scored like any other."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    end, prefix = 77, len(tokenizer.encode("Document 0 begins here and"))
    made = [
        Candidate("rollout", [5, 6], " fox"),
        Candidate("rollout", [5, end], " fox"),
        Candidate("rollout", [end], ""),
    ]
    group = make_group(0, [0.4])
    async with FakeJudge() as server:  # a token at place p has log-prob -0.01 p
        judge_settings = make_settings(
            endpoints=(Endpoint(server.url),), criteria={"likelihood": 1.0}, tokenizer=str(tmp_path)
        )
        async with Judge(judge_settings, document_end=end) as judge:
            await judge.check(5.0)
            [judged] = await judge.score([replace(group, candidates=[*made, made[1]])])
    count = len(tokenizer.encode(" fox"))
    expected = [-0.01 * (prefix + (tokens - 1) / 2) for tokens in (count, count + 1, 1, count + 1)]
    assert judged.scores == pytest.approx(expected)
    assert judged.candidates == [*made, made[1]]


async def test_a_group_that_arrives_dropped_stays_so() -> None:
    async with FakeJudge() as server:
        group = replace(make_group(0, [0.4, 0.9]), dropped="rollout timeout")
        empty = replace(make_group(1, [0.4]), candidates=[])
        judged, _ = await score(make_settings(server.url), [group, empty])
        assert judged[0] == group
        assert judged[1].dropped == "judge-no-candidates"
        assert server.requests == 0


async def test_unreadable_answers_drop_the_group_with_its_reason() -> None:
    async with FakeJudge(lambda index: "no-verdict") as server:
        [group], counters = await score(make_settings(server.url), [make_group(0, [0.4, 0.9])])
        assert group.scores is None
        assert group.dropped == "judge-quality-too-few-verdicts"
        assert counters["groups/dropped/judge-quality-too-few-verdicts"] == 1
        assert counters["verdicts-missing/quality"] == 2


def unreadable_about(*lost: float) -> Callable[[str], str]:
    """A judge that says nothing about candidates of these qualities."""
    marks = [f"q={quality}\n" for quality in lost]
    return lambda prompt: "Hm." if any(mark in prompt for mark in marks) else truthful_answer(prompt)


@pytest.mark.parametrize("name", ["all_pairs", "all_pairs_swap", "circulant_bt", "two_ended_bt"])
async def test_a_candidate_that_cannot_be_judged_is_dropped_and_its_group_stays(name: str) -> None:
    async with FakeJudge(answer=unreadable_about(0.7)) as server:
        group = make_group(0, [0.4, 0.9, 0.7, 0.1, 0.6])
        twice = replace(group, candidates=[*group.candidates, group.candidates[2], group.candidates[1]])
        judge_settings = make_settings(
            server.url, schedule=ScheduleSettings(name), criteria={"quality": 1, "safety": 1}
        )
        [judged], counters = await score(judge_settings, [twice])
        kept = [twice.candidates[i] for i in (0, 1, 3, 4, 6)]
        assert judged.candidates == kept
        assert judged.dropped is None
        assert judged.scores is not None
        assert [len(values) for values in (judged.scores, *judged.criterion_scores.values())] == [5, 5, 5]
        assert np.argsort(judged.scores)[:3].tolist() == [2, 0, 3]
        assert judged.scores[1] == judged.scores[4] == max(judged.scores)
        assert counters["candidates/dropped/quality-too-few-verdicts"] == 2
        assert not any(name.startswith("groups/dropped") for name in counters)
        qualities = [0.4, 0.9, 0.1, 0.6, 0.9]
        for first, second, outcome in judged.verdicts["quality"]:
            assert outcome == float(qualities[int(first)] > qualities[int(second)])
        assert group_from_json(json.loads(json.dumps(judged.to_json()))) == judged


async def test_what_one_criterion_cannot_judge_another_does_not_score() -> None:
    def answer(prompt: str) -> str:
        return "Hm." if "FINAL DECISION" in prompt and "q=0.9" in prompt else truthful_answer(prompt)

    async with FakeJudge(answer=answer) as server:
        judge_settings = make_settings(server.url, criteria={"quality": 1, "safety": 1})
        [judged], counters = await score(judge_settings, [make_group(0, [0.4, 0.9, 0.1])])
        assert [c.ids for c in judged.candidates] == [[1], [3]]
        assert judged.criterion_scores == {"quality": [0.5, 0.0], "safety": [1.0, 1.0]}
        assert counters["candidates/dropped/safety-too-few-verdicts"] == 1
        assert {tuple(shown[:2]) for shown in judged.verdicts["quality"]} == {(0, 1), (1, 0)}


@pytest.mark.parametrize("unreadable", [0.1, 0.2, 0.3])
async def test_groups_survive_unreadable_answers(unreadable: float) -> None:
    """17 candidates, one vote a judgement: a group was lost with any of them, 14 / 64 / 95 % of the groups."""

    def fault(index: int) -> Fault | None:
        return "no-verdict" if random.Random(index).random() < unreadable else None

    async with FakeJudge(fault) as server:
        groups = [make_group(i, [round(0.05 * (1 + k), 2) for k in range(17)]) for i in range(3)]
        judge_settings = make_settings(server.url, criteria={"safety": 1.0})
        judged, counters = await score(judge_settings, groups)
        assert [group.dropped for group in judged] == [None] * 3
        lost = sum(17 - len(group.candidates) for group in judged)
        assert lost == counters.get("candidates/dropped/safety-too-few-verdicts", 0) <= 3 * 17 * unreadable**2 * 3


async def test_missing_votes_are_never_replayed_from_the_cache(tmp_path: Path) -> None:
    """Half of the answers are unreadable in the first run; a second one asks for what is missing, and for no more."""
    cached = {"cache_path": tmp_path / "cache.sqlite", "criteria": {"safety": 1.0}, "votes": 1}
    groups = [make_group(0, [round(0.05 * (1 + k), 2) for k in range(16)])]
    async with FakeJudge(lambda index: "no-verdict" if index % 2 == 0 else None) as server:
        [first], _ = await score(make_settings(server.url, **cached), groups)
        lost = 16 - len(first.candidates)
        asked = server.requests
        assert 0 < lost < 16
    async with FakeJudge() as server:
        [again], _ = await score(make_settings(server.url, **cached), groups)
        assert again.candidates == groups[0].candidates
        assert 0 < server.requests < asked
        before = server.requests
        assert (await score(make_settings(server.url, **cached), groups))[0] == [again]
        assert server.requests == before


async def test_of_five_votes_the_readable_ones_are_kept(tmp_path: Path) -> None:
    cached = {"cache_path": tmp_path / "cache.sqlite", "criteria": {"safety": 1.0}, "votes": 5}
    turns = iter(range(10**6))

    def partly_readable(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        for choice in reply["choices"]:
            choice["message"]["content"] = "Hm." if next(turns) % 3 == 0 else choice["message"]["content"]
        return reply

    async with FakeJudge(edits=partly_readable) as server:
        [first], counters = await score(make_settings(server.url, **cached), [make_group(0, [0.4, 0.9])])
        assert counters["verdicts-missing/safety"] > 0
        assert all(3 < votes <= 5 for votes in first.votes["safety"])
        assert {body["n"] for body in server.bodies} == {5, 2}  # what was missing, no more


@pytest.mark.parametrize("kind", ["suffix", "rollout"])
async def test_a_pivot_is_compared_with_and_neither_scored_nor_its_own_reference(kind: Any) -> None:
    async with FakeJudge() as server:
        group = make_group(3, [0.5, 0.9, 0.1, 0.6])
        if kind == "suffix":
            group = replace(group, candidates=group.candidates[1:])
        criteria = {"quality": 1.0, "safety": 1.0}
        judge_settings = make_settings(server.url, criteria=criteria, schedule=ScheduleSettings("pivot", pivot=kind))
        [judged], counters = await score(judge_settings, [group])
        assert judged.pivot is not None
        assert judged.pivot.kind == kind
        assert judged.pivot not in judged.candidates
        assert len(judged.candidates) == 3
        assert counters["verdicts/safety"] == 3
        assert {place for shown in judged.verdicts["quality"] for place in shown[:2]} == {-1, 0, 1, 2}
        assert all(-1 in shown[:2] for shown in judged.verdicts["quality"])
        won = [float(quality_of(c.text) > quality_of(judged.pivot.text)) for c in judged.candidates]
        assert judged.criterion_scores["quality"] == won
        assert group_from_json(json.loads(json.dumps(judged.to_json()))) == judged


async def test_a_rollout_equal_to_the_pivot_draws_with_it() -> None:
    async with FakeJudge() as server:
        group = make_group(3, [0.5, 0.9, 0.1])
        copy = replace(group.candidates[0], kind="rollout", ids=[9])
        group = replace(group, candidates=[copy, *group.candidates[1:]])
        [judged], _ = await score(make_settings(server.url, schedule=ScheduleSettings("pivot")), [group])
        assert judged.scores == [0.5, 1.0, 0.0]
        assert judged.candidates == group.candidates


@pytest.mark.parametrize("schedule", ["all_pairs", "pivot", "circulant_bt", "two_ended_bt"])
@pytest.mark.parametrize("bias", [0.5, 1.0, 3.0])
async def test_a_comparison_of_two_is_direct_and_in_both_orders(schedule: str, bias: float, tmp_path: Path) -> None:
    """Under any schedule; what the judge's preference for the first option adds in one order it takes away in the other."""

    class Biased(Judge):
        async def _ask_criterion(self, criterion: Any, setting: str, sheet: Any, deadline: float) -> Any:
            async def ask(calls: Sequence[Any]) -> list[Any]:
                answers = []
                for call in calls:
                    first, second = (quality_of(part) for part in "".join(call.prompt).split("[begin option ")[1:])
                    logit = 2 * (first - second)
                    answers.append(1 / (1 + math.exp(-logit - bias)))
                return answers

            return await criterion.score(sheet, ask)

    judge = Biased(
        make_settings("http://a", default_verdict="soft", schedule=ScheduleSettings(schedule, pivot="rollout"))
    )
    group = make_group(0, [0.4, 0.9])
    pair = replace(group, candidates=[replace(c, kind="rollout") for c in group.candidates])
    [judged] = await judge.score([pair], objective="pair")
    assert judged.scores is not None
    low, high = (1 / (1 + math.exp(-logit)) for logit in (1 - bias, 1 + bias))
    share = (low + high) / 2
    assert judged.scores == pytest.approx([1 - share, share])
    assert len(judged.verdicts["quality"]) == 2


async def test_a_judge_that_hangs_costs_no_more_than_the_deadline() -> None:
    async with FakeJudge(lambda index: "hang") as server:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        judged, _ = await score(
            make_settings(server.url, deadline_s=1.0), [make_group(i, [0.4, 0.9]) for i in range(20)]
        )
        assert loop.time() - begin < 2.0
        assert {group.dropped for group in judged} == {"judge-quality-deadline"}


def fault_plan(seed: int) -> FaultPlan:
    """30 % failures, 10 % hanging, 10 % nonsense."""

    def plan(index: int) -> Fault | None:
        draw = random.Random(seed * 100_003 + index)
        kinds: list[Fault | None] = [
            "status",
            "rate-limit",
            "disconnect",
            "hang",
            "not-json",
            "wrong-shape",
            "no-verdict",
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
    assert seconds < deadline_s + 2.0  # a hanging server would take an hour
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
        assert loop.time() - begin < 3.0


async def test_agreement_with_all_pairs_is_counted_on_a_sample() -> None:
    async with FakeJudge() as server:
        judge_settings = make_settings(server.url, schedule=ScheduleSettings("circulant_bt", degree=2), audit_rate=1.0)
        _, counters = await score(judge_settings, [make_group(i, [0.4, 0.9, 0.1, 0.7, 0.2]) for i in range(4)])
        assert counters["audit/quality/groups"] == 4
        assert 0 < counters["audit/quality/same-best"] <= 4


async def test_a_criterion_of_the_users_own_needs_only_a_file(tmp_path: Path) -> None:
    prompt = tmp_path / "liveliness.txt"
    prompt.write_text(
        "+++\nname = 'liveliness'\nkind = 'pointwise'\npattern = 'RATING: (GOOD|BAD)'\n[values]\nGOOD = 1\nBAD = 0\n+++\n"
        "How lively is this text?\n{{candidate}}\nEnd with RATING: GOOD or RATING: BAD.\n"
    )
    async with FakeJudge() as server:
        judge_settings = make_settings(server.url, criteria={str(prompt): 2.0}, votes=3)
        [group], _ = await score(judge_settings, [make_group(0, [0.4, 0.9])])
        assert group.criterion_scores == {"liveliness": [0.0, 1.0]}
        assert group.scores == [0.0, 2.0]
        assert all("[begin candidate" in shown for shown in server.prompts)


async def test_equal_seeds_show_equal_prompts() -> None:
    shown = []
    for _ in range(2):
        async with FakeJudge() as server:
            await score(
                make_settings(server.url, schedule=ScheduleSettings("circulant_bt")), [make_group(7, [0.1, 0.9, 0.4])]
            )
            shown.append(sorted(server.prompts))
    assert shown[0] == shown[1]
