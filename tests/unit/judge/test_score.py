"""The judge as a whole against an in-process server: scores, combinations, caching, failing servers."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_judge import FakeJudge, Fault, quality_of, truthful_answer
from judge_cases import make_group, make_settings, score
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.judge import Endpoint, Judge, ScheduleSettings
from megatron_sip.records import Candidate, group_from_json


async def test_all_pairs_scores_are_win_rates() -> None:
    async with FakeJudge() as server:
        [group], counters = await score(make_settings(server.url), [make_group(0, [0.4, 0.9, 0.1, 0.6])])
        assert group.scores == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])
        assert group.criterion_scores == {"quality": group.scores}
        assert group.votes == {"quality": [3, 3, 3, 3]}
        assert group.dropped is None
        assert server.requests == counters["calls"] == counters["verdicts/quality"] == 6


async def test_prompts_of_two_leaders_fill_all_servers_evenly_and_each_stays_on_one() -> None:
    async with FakeJudge() as a, FakeJudge() as b, FakeJudge() as c, FakeJudge() as d:
        judges = [a, b, c, d]
        settings = make_settings(*(judge.url for judge in judges))
        for leader in range(2):
            await score(settings, [make_group(8 + 6 * leader + number, [0.4, 0.9, 0.1]) for number in range(6)])
    shown = [Counter(re.findall(r"Document (\d+) begins", "".join(judge.prompts))) for judge in judges]
    assert sorted(int(prompt) for counts in shown for prompt in counts) == list(range(8, 20))
    assert [len(counts) for counts in shown] == [3, 3, 3, 3]


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
