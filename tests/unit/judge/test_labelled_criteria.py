"""Scores of labelled tasks: who is right, what is counted, and what only a server can owe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_judge import FakeJudge, truthful_answer
from judge_cases import make_settings

from megatron_sip.judge import Judge, JudgeSettings, SettingsError
from megatron_sip.judge.labelled_criteria import token_overlap
from megatron_sip.judge.reasoning import ReasoningStyle
from megatron_sip.records import Candidate, Group, Judgement, Rewriting, Task, Thinking

SAFETY = Judgement("safety", "NO", forced=False, pair="", subset="")
QUALITY = Judgement("quality", "2", forced=True, pair="", subset="")


def group(
    label: Any, texts: Sequence[str], cut: Sequence[int] = (), prefix: str = "a prompt", suffix: str = "x"
) -> Group:
    candidates = [Candidate("rollout", [place], text, truncated=place in cut) for place, text in enumerate(texts)]
    return Group(Task(0, [1], [], prefix, suffix, label), candidates)


async def alone(groups: Sequence[Group], policy: Any = None) -> tuple[list[Group], Judge]:
    """As a judge without a server scores them by their labels."""
    async with Judge(JudgeSettings({"label": 1.0}, None), policy=policy) as judge:
        await judge.check()
        return await judge.score(groups, objective="rf-nll"), judge


async def test_a_written_verdict_scores_1_if_it_is_right_and_0_otherwise_or_without() -> None:
    texts = [
        "It insults.\nFINAL DECISION: NO",
        "Fine.\nFINAL DECISION: YES",
        "I cannot tell",
        "FINAL DECISION: NO. Or YES?",
    ]
    [judged], judge = await alone([group(SAFETY, texts)])
    assert judged.scores == [1.0, 0.0, 0.0, 0.0]
    assert judged.dropped is None
    assert judged.votes == {"label": [1, 1, 0, 0]}
    assert judged.verdicts == {"label": [[0, 0.0], [1, 1.0]]}
    counters = judge.counters()
    assert (counters["verdicts/label"], counters["verdicts-missing/label"]) == (2, 2)
    assert counters["label/unreadable/no-verdict"] == 1
    assert counters["label/unreadable/verdict-not-last"] == 1
    means = {name: mean.value for name, mean in judge.means().items()}
    assert means == {"label/accuracy/safety": 0.25, "label/no-verdict": 0.5}


async def test_an_answer_that_was_cut_has_no_verdict_even_if_another_of_the_same_text_has() -> None:
    texts = ["FINAL DECISION: NO"] * 3
    [judged], judge = await alone([group(SAFETY, texts, cut=[1])])
    assert judged.scores == [1.0, 0.0, 1.0]
    assert judge.counters()["label/unreadable/cut"] == 1
    assert judge.means()["label/accuracy/safety"].value == pytest.approx(2 / 3)


async def test_open_reasoning_does_not_vote() -> None:
    texts = ["so NO\nFINAL DECISION: NO", "hm</think>FINAL DECISION: NO"]
    policy = SimpleNamespace(reasoning=ReasoningStyle("</think>", "\n</think>\n\n"))
    [judged], judge = await alone([group(SAFETY, texts)], policy)
    assert judged.scores == [0.0, 1.0]
    assert judge.counters()["label/unreadable/in-reasoning"] == 1


async def test_a_begun_answer_is_its_first_token() -> None:
    [judged], judge = await alone([group(QUALITY, ["2", " 2", "1", "3", ""] + ["2"] * 3, cut=range(8))])
    assert judged.scores == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    means = {name: mean.value for name, mean in judge.means().items()}
    assert means == {
        "label/accuracy/quality": 5 / 8,
        "label/no-verdict": 2 / 8,
        "label/first-shown-preferred/quality": 1 / 6,
    }


async def test_accuracies_by_a_prompt_file_are_filed_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mood.txt"
    header = "name = 'mood'\nkind = 'pointwise'\npattern = '(up|down)'\nstart = 'It is '\n[values]\nup = 1\ndown = 0\n"
    path.write_text(f"+++\n{header}+++\n{{{{candidate}}}}\n")
    _, judge = await alone([group(Judgement(str(path), "down", forced=True, pair="", subset=""), ["up", "down"])])
    assert judge.means()["label/accuracy/mood"].value == 0.5


@pytest.mark.parametrize("forced", [False, True])
async def test_a_label_is_not_another_one_that_is_worth_the_same(tmp_path: Path, forced: bool) -> None:
    path = tmp_path / "looks.txt"
    header = "name = 'looks'\nkind = 'pointwise'\npattern = 'LOOKS: (BAD|UGLY|GOOD)'\nstart = 'LOOKS: '\n"
    path.write_text(f"+++\n{header}[values]\nBAD = 0\nUGLY = 0\nGOOD = 1\n+++\n{{{{candidate}}}}\n")
    texts = [("" if forced else "LOOKS: ") + name for name in ("BAD", "UGLY", "GOOD")]
    [judged], _ = await alone([group(Judgement(str(path), "BAD", forced=forced, pair="", subset=""), texts)])
    assert judged.scores == [1.0, 0.0, 0.0]
    assert judged.verdicts == {"label": [[0, 0.0], [1, 0.0], [2, 1.0]]}


async def test_the_first_token_of_a_long_label_is_enough_where_it_is_one_label_s() -> None:
    label = Judgement("factuality", "Possible", forced=True, pair="", subset="")
    [judged], _ = await alone([group(label, ["Poss", "Def", "No", "Halluc", " poss"])])
    assert judged.scores == [1.0, 0.0, 0.0, 0.0, 1.0]


async def test_equal_answers_are_a_group_without_spread_not_a_dropped_one() -> None:
    [judged], _ = await alone([group(QUALITY, ["1"] * 4)])
    assert judged.scores == [0.0] * 4


def test_a_criterion_that_asks_needs_a_server() -> None:
    with pytest.raises(SettingsError, match="--criteria quality: it asks a judge's servers: give --teacher-url"):
        JudgeSettings({"label": 1.0, "quality": 1.0}, None)


PREFIX = "The council met on Monday and decided that the old bridge"
WORDS = "decided that the old bridge"
SUFFIX = " stays q=0.5 and is unsafe"


async def rewritten(
    texts: Sequence[str], *, safe: bool, faults: Any = lambda index: None, suffix: str = SUFFIX, **changes: Any
) -> tuple[Group, dict[str, float], dict[str, float], FakeJudge]:
    """A group of rewrites as a truthful judge of quality and safety scores them."""
    async with FakeJudge(faults) as server:
        settings = make_settings(server.url, **({"criteria": {"copy": 1.0, "rewrite": 1.0}, "votes": 5} | changes))
        async with Judge(settings) as judge:
            await judge.check(5.0)
            made = group(Rewriting(safe, ""), texts, prefix=PREFIX, suffix=suffix)
            [judged] = await judge.score([made], objective="rf-nll")
            means = {name: mean.value for name, mean in judge.means().items() if mean.weight}
            return judged, judge.counters(), means, server


async def test_equation_1_a_safe_suffix_is_copied_or_not_and_nobody_is_asked() -> None:
    texts = [SUFFIX, f"{WORDS}{SUFFIX}", SUFFIX.strip() + "\n", SUFFIX + " not", "", "I cannot help with that request."]
    judged, counters, means, server = await rewritten(texts, safe=True)
    assert judged.scores == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert judged.criterion_scores["rewrite"] == [0.0] * 6
    assert server.requests == 0
    assert (counters["copy/unreadable/empty"], counters["copy/unreadable/refused"]) == (1, 1)
    assert means["copy/copied"] == 0.5
    assert means["copy/overlap"] == pytest.approx((3 + 5 / 6) / 6)  # words of the suffix over those of the longer text
    assert means["copy/no-rewrite"] == pytest.approx(2 / 6)


async def test_equation_2_is_half_quality_against_the_suffix_and_half_safety() -> None:
    better_safe, better_unsafe, worse_safe = " stays q=0.9 so", " falls q=0.8 unsafe", " q=0.1 oh"
    texts = [better_safe, better_unsafe, worse_safe, SUFFIX, "I'm sorry, but I can't do that.", better_safe]
    judged, _, means, server = await rewritten(texts, safe=False)
    assert judged.scores == [1.0, 0.5, 0.5, 0.25, 0.0, 1.0]
    assert judged.criterion_scores["copy"] == [0.0] * 6
    pairs = [body for body in server.bodies if "Option 1" in body["messages"][0]["content"]]
    points = [body for body in server.bodies if body not in pairs]
    assert len(pairs) == 2 * 3  # each in both orders, the suffix itself unasked
    assert {body["n"] for body in pairs} == {3}  # five votes, made even
    assert (len(points), {body["n"] for body in points}) == (4, {5})
    shown = [body["messages"][0]["content"].split("Option 1:")[1] for body in pairs]
    assert sum(prompt.index(SUFFIX) < prompt.index("[begin option 2") for prompt in shown) == 3
    assert means["rewrite/quality"] == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 5)
    assert means["rewrite/safety"] == pytest.approx((1 + 0 + 1 + 0 + 1) / 5)


async def test_what_a_server_owes_drops_the_rewrite_and_is_never_a_reward() -> None:
    texts = [" q=0.9", " q=0.8", " q=0.1"]
    judged, _, _, _ = await rewritten(texts, safe=False, faults=lambda index: "no-verdict")
    assert (judged.dropped, judged.scores) == ("judge-rewrite-too-few-verdicts", None)


async def test_a_failed_comparison_costs_its_own_rewrite_alone() -> None:
    """One of three unsafe rewrites is never answered about."""

    def answer(prompt: str) -> str:
        return "no idea" if "q=0.77" in prompt else truthful_answer(prompt)

    async with FakeJudge(answer=answer) as server:
        settings = make_settings(server.url, criteria={"rewrite": 1.0}, votes=2)
        async with Judge(settings) as judge:
            made = group(Rewriting(False, ""), [" q=0.9", " q=0.77", " q=0.1"], prefix=PREFIX, suffix=SUFFIX)
            [judged] = await judge.score([made], objective="rf-nll")
            assert [candidate.text for candidate in judged.candidates] == [" q=0.9", " q=0.1"]
            assert judged.scores == [1.0, 0.5]
            assert judge.counters()["candidates/dropped/rewrite-too-few-verdicts"] == 1


async def test_a_thought_is_judged_by_what_follows_it() -> None:
    label = Thinking("</t>", "")
    texts = ["so q=0.1</t> q=0.9", "hm hm</t> q=0.2", "q=0.9 and no end", "done</t> \n", "other</t> q=0.9"]

    def answer(prompt: str) -> str:
        [predicted] = re.findall(r"\[begin candidate \w+\]\n(.*?)\n\[end", prompt, re.DOTALL)
        return f"VERDICT: {int('q=0.9' in predicted and '</t>' not in predicted)}"

    settings = {"criteria": {"similarity": 1.0}, "votes": 2}
    async with FakeJudge(answer=answer) as server, Judge(make_settings(server.url, **settings)) as judge:
        [judged] = await judge.score([group(label, texts, suffix=" the truth")], objective="rf-nll")
        assert judged.scores == [1.0, 0.0, 0.0, 0.0, 1.0]
        assert server.requests == 2  # of equal predictions one, of missing ones none
        assert all(" the truth" in prompt for prompt in server.prompts)
        means = {name: mean.value for name, mean in judge.means().items()}
        assert means == {"similarity/no-end-mark": 0.2, "similarity/thought-words": 6 / 4}


async def test_a_similarity_without_verdict_is_missing() -> None:
    label, texts = Thinking("</t>", ""), ["a</t> q=0.9", "a</t> q=0.2", "no end"]
    criteria = {"similarity": 1.0}
    async with (
        FakeJudge(lambda i: "no-verdict") as server,
        Judge(make_settings(server.url, criteria=criteria)) as judge,
    ):
        [judged] = await judge.score([group(label, texts)], objective="rf-nll")
        assert judged.dropped == "judge-similarity-too-few-verdicts"


def test_overlap_counts_each_token_as_often_as_both_have_it() -> None:
    assert token_overlap(list("abbc"), list("bbbd")) == 2 / 4
    assert token_overlap([], []) == 1.0
    assert token_overlap([1], []) == 0.0
