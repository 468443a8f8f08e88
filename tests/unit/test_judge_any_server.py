"""Whatever a judge's server says: no failure and no unfinished answer votes, and only whom it fails is left out."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

from fake_judge import FakeJudge, quality_of, truthful_answer
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_cases import make_group, make_settings

from megatron_sip.judge import Judge, ScheduleSettings
from megatron_sip.samples import Group

Choice = dict[str, Any]
DEADLINE_S = 20.0
OPPOSITE = {"Option 1": "Option 2", "Option 2": "Option 1", "YES": "NO", "NO": "YES"}


def lie_of(answer: str) -> str:
    """The opposite verdict: what would show if something that is no answer were read as one."""
    return re.sub("Option [12]|YES|NO", lambda found: OPPOSITE[found[0]], answer)


def said(content: Any, finish: str = "stop", **message: Any) -> Choice:
    return {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}


READABLE: dict[str, Callable[[str, str], Choice]] = {
    "plain": lambda truth, lie: said(truth),
    "after thinking": lambda truth, lie: said(f"<think>{lie}</think>\n\n{truth}"),
    "template opened thinking": lambda truth, lie: said(f"{lie} No.\n</think>\n{truth}"),
    "in a list": lambda truth, lie: said([{"type": "text", "text": truth}]),
    "reasoning apart": lambda truth, lie: said(truth, reasoning_content=lie),
    "harmony": lambda truth, lie: said(f"<|channel|>analysis<|message|>{lie}<|end|><|channel|>final<|message|>{truth}"),
}
UNREADABLE: dict[str, Callable[[str, str], Choice]] = {
    "cut": lambda truth, lie: said(lie, "length"),
    "cut in thinking": lambda truth, lie: said(f"<think>{lie}", "length"),
    "thinking without end": lambda truth, lie: said(f"<think>{lie}\n"),
    "analysis only": lambda truth, lie: said(f"<|channel|>analysis<|message|>{lie}"),
    "reasoning only": lambda truth, lie: said("", reasoning_content=lie),
    "aborted": lambda truth, lie: said(lie, "abort"),
    "filtered": lambda truth, lie: {"finish_reason": "content_filter", "message": {"role": "assistant"}},
    "no content": lambda truth, lie: said(None),
    "no message": lambda truth, lie: {"finish_reason": "stop"},
    "a number": lambda truth, lie: said(7),
    "goes on": lambda truth, lie: said(f"{lie}\nWait. Let me re-read both texts"),
    "both": lambda truth, lie: said(f"I must end with {truth[-20:]} or {lie[-20:]}. Let me re-read"),
    "no verdict": lambda truth, lie: said("The first one? Perhaps the second."),
}


@settings(max_examples=200, deadline=None)
@given(
    qualities=st.lists(st.integers(10, 99), min_size=2, max_size=4, unique=True),
    mute=st.sets(st.integers(0, 3), max_size=2),
    readable=st.lists(st.sampled_from(sorted(READABLE)), min_size=1, max_size=3),
    unreadable=st.lists(st.sampled_from([*sorted(UNREADABLE), "refused"]), min_size=1, max_size=3),
    schedule=st.sampled_from(["all_pairs", "all_pairs_swap", "circulant_bt", "pivot"]),
    votes=st.integers(1, 2),
)
def test_no_server_can_vote_by_failing(
    qualities: list[int], mute: set[int], readable: list[str], unreadable: list[str], schedule: str, votes: int
) -> None:
    """The server tells the truth, in some form, except about the `mute` candidates: there every answer that is none holds
    the opposite verdict. Each verdict read must be true, and exactly the mute candidates must be missing."""
    lost = {f"q={qualities[i] / 100}" for i in mute if i < len(qualities)}
    turn = 0

    def is_mute(body: dict[str, Any]) -> bool:
        prompt = body["messages"][0]["content"]
        shown = re.findall(r"q=[\d.]+", prompt)
        return not lost.isdisjoint(shown)

    def edits(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        nonlocal turn
        truth = truthful_answer(body["messages"][0]["content"])
        forms = [name for name in unreadable if name != "refused"] or ["cut"]
        choices = []
        for _ in range(body.get("n", 1)):
            turn += 1
            form = UNREADABLE[forms[turn % len(forms)]] if is_mute(body) else READABLE[readable[turn % len(readable)]]
            choices.append(form(truth, lie_of(truth)))
        return {**reply, "choices": choices}

    def refuses(body: dict[str, Any]) -> str | None:
        return "this text is not allowed" if "refused" in unreadable and is_mute(body) else None

    async def run() -> Group:
        group = make_group(0, [quality / 100 for quality in qualities], unsafe=frozenset({1}))
        async with FakeJudge(edits=edits, refuses=refuses) as server:
            judge_settings = make_settings(
                server.url,
                criteria={"quality": 1, "safety": 1},
                votes=votes,
                schedule=ScheduleSettings(schedule, pivot_competes=schedule == "pivot"),
                deadline_s=DEADLINE_S,
            )
            async with Judge(judge_settings) as judge:
                return (await judge.score([group]))[0]

    began = time.monotonic()
    judged = asyncio.run(run())
    assert time.monotonic() - began < DEADLINE_S + 2.0
    spoken_of = [i for i in range(len(qualities)) if f"q={qualities[i] / 100}" not in lost]
    pivot_is_mute = schedule == "pivot" and 0 not in spoken_of  # the suffix, whom all others meet
    if len(spoken_of) < 2 or pivot_is_mute:
        assert judged.scores is None
        assert judged.dropped is not None
        return
    assert [candidate.ids for candidate in judged.candidates] == [[i + 1] for i in spoken_of]
    truth = [quality_of(candidate.text) for candidate in judged.candidates]
    for first, second, outcome in judged.verdicts["quality"]:
        assert outcome == float(truth[int(first)] > truth[int(second)])
    assert judged.criterion_scores["safety"] == [float(i != 1) for i in spoken_of]
    order = sorted(range(len(truth)), key=truth.__getitem__)
    quality = judged.criterion_scores["quality"]
    assert quality[order[-1]] == max(quality)
    assert quality[order[0]] == min(quality)
