"""Judges of any behaviour: no failure or unfinished answer becomes a vote, and each costs only the candidates concerned."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from typing import Any

from aiohttp import web
from app_server import AppServer
from fake_judge import truthful_answer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge_cases import make_settings

from megatron_sip.judge import Judge, ScheduleSettings
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.serving.server import RetryPolicy

DEADLINE_S = 20.0
WRONG = "Conclusion: Option 1\n\nFINAL DECISION: YES"
"""A verdict that no judge has given: whoever reads it counts it for both criteria."""


def completion(*contents: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    choices = [
        {"index": i, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
        for i, content in enumerate(contents)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def good(way: str, truth: str, n: int) -> Any:
    """Replies in which `n` truthful verdicts stand."""
    full = completion(*[truth] * n)
    match way:
        case "thinks first":
            return completion(*[f"<think>Perhaps {WRONG}</think>\n\n{truth}"] * n)
        case "reasons apart":
            return completion(*[truth] * n, reasoning_content=WRONG)
        case "harmony":
            marked = f"<|channel|>analysis<|message|>{WRONG}<|end|><|start|>assistant<|channel|>final<|message|>{truth}"
            return completion(*[marked] * n)
        case "parts":
            return completion(*[[{"type": "reasoning", "text": WRONG}, {"type": "text", "text": truth}]] * n)
        case "any order":
            return {**full, "choices": full["choices"][::-1]}
        case "no usage":
            return {"choices": full["choices"], "object": None, "usage": "lots"}
        case "no finish":
            return completion(*[truth] * n, finish=None)
        case "ignores n":
            return completion(truth)
        case "more than n":
            return completion(*[truth] * n, WRONG)
    return full


GOOD = ["plain", "thinks first", "reasons apart", "harmony", "parts", "any order", "no usage", "no finish", "ignores n"]
GOOD += ["more than n", "fails first"]


def bad(way: str, truth: str, n: int) -> Any:
    """Replies in which no verdict stands that was given and finished."""
    match way:
        case "empty":
            return ""
        case "html":
            return f"<html>{WRONG}</html>"
        case "half":
            whole = json.dumps(completion(*[truth] * n))
            return whole[: len(whole) - 40]
        case "wrong shape":
            return {"verdict": WRONG, "choices": {"0": WRONG}}
        case "no choices":
            return {"choices": [], "text": WRONG}
        case "bare choices":
            return {"choices": [{}] * n, "content": WRONG}
        case "text choices":
            return {"choices": [WRONG] * n}
        case "filtered":
            return {"choices": [{"finish_reason": "content_filter", "message": {"role": "assistant"}}] * n}
        case "filtered late":
            return completion(*[truth] * n, finish="content_filter")
        case "aborted":
            return completion(*[truth] * n, finish="abort")
        case "cut":
            return completion(*[truth] * n, finish="length")
        case "reasons only":
            return completion(*[None] * n, reasoning_content=WRONG)
        case "open thought":
            return completion(*[f"<think>{WRONG}"] * n)
        case "cut thought":
            return completion(*[f"<think>{WRONG}"] * n, finish="length")
        case "closed thought":
            return completion(*[f"<think>{WRONG}</think>I do not know."] * n)
        case "analysis":
            return completion(*[f"<|channel|>analysis<|message|>{WRONG}"] * n)
        case "rules":
            rules = "Conclusion: Option 1 or Conclusion: Option 2, FINAL DECISION: YES or FINAL DECISION: NO"
            return completion(*[f"I must end with {rules}. Let me re-read"] * n)
        case "thought parts":
            return completion(*[[{"type": "thinking", "text": WRONG}]] * n)
    return completion(*["The first, or is it the second?"] * n)


BAD = [
    *("empty", "html", "half", "wrong shape", "no choices", "bare choices", "text choices", "filtered"),
    "filtered late",
    *("aborted", "cut", "reasons only", "open thought", "cut thought", "closed thought", "analysis", "rules"),
    *("thought parts", "no verdict", "hangs", "closes", "too long"),
]
STATUSES = [201, 204, 302, 400, 401, 403, 404, 422, 429, 500, 502, 503]


class AnyJudge(AppServer):
    """Answers by the marks `way=...` in the candidates that it is shown: a bad one wins over a good one."""

    def __init__(self) -> None:
        super().__init__({"POST /v1/chat/completions": self._complete})
        self._asked: Counter[str] = Counter()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["messages"][0]["content"]
        ways = re.findall(r"way=([^.]+)\.", prompt)
        way = next((way for way in ways if way not in GOOD), ways[0])
        self._asked[prompt] += 1
        if way.isdigit():
            return web.Response(
                status=int(way), text=f"top_p, n must be 1, logprobs: {WRONG}", headers={"Location": "/"}
            )
        if way == "hangs":
            await asyncio.sleep(3600)
        if way == "fails first" and self._asked[prompt] == 1:
            return web.Response(status=500)
        if way == "closes":
            assert request.transport is not None
            request.transport.close()
        made = (good if way in GOOD else bad)(way, truthful_answer(prompt), body.get("n", 1))
        return web.Response(text=made if isinstance(made, str) else json.dumps(made), content_type="application/json")


def make_group(index: int, ways: list[str], qualities: list[int], unsafe: list[bool]) -> Group:
    texts = [
        f" q=0.{quality} way={way}.{' unsafe' if risk else ''}"
        for way, quality, risk in zip(ways, qualities, unsafe, strict=False)
    ]
    kinds = ["suffix", *["rollout"] * (len(texts) - 1)]
    candidates = [Candidate(kind, [i + 1], text) for i, (kind, text) in enumerate(zip(kinds, texts, strict=True))]  # type: ignore[arg-type]
    return Group(Task(index, [1, 2], [1], f"Document {index} begins here and", texts[0]), candidates)


WAYS = st.sampled_from(GOOD) | st.sampled_from(GOOD) | st.sampled_from(BAD) | st.sampled_from(list(map(str, STATUSES)))
GROUPS = st.tuples(
    st.lists(WAYS, min_size=2, max_size=4),
    st.permutations([100, 300, 500, 700, 900]),
    st.lists(st.booleans(), min_size=5, max_size=5),
)


def check(group: Group, judged: Group, criterion: str) -> None:
    sane = [c for c in group.candidates if re.findall(r"way=([^.]+)\.", c.text)[0] in GOOD]
    if len(sane) < 2:
        assert judged.scores is None
        assert judged.dropped is not None
        return
    assert judged.dropped is None, (judged.dropped, [c.text for c in group.candidates])
    assert [c.text for c in judged.candidates] == [c.text for c in sane]
    assert judged.scores is not None
    if criterion == "safety":
        assert judged.scores == [0.0 if "unsafe" in c.text else 1.0 for c in sane]
        return
    by_quality = sorted(range(len(sane)), key=lambda i: float(re.findall(r"q=([0-9.]+) ", sane[i].text)[0]))
    assert sorted(range(len(sane)), key=judged.scores.__getitem__) == by_quality
    for first, second, value in judged.verdicts["quality"]:
        better = by_quality.index(int(first)) > by_quality.index(int(second))
        assert value == float(better)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["quality", "safety", "safety"]),
    st.lists(GROUPS, min_size=10, max_size=10),
    st.sampled_from(["all_pairs", "circulant_bt"]),
)
def test_no_behaviour_of_a_judge_is_taken_for_a_verdict(
    criterion: str, cases: list[tuple[list[str], list[int], list[bool]]], schedule: str
) -> None:
    """Twenty examples of ten groups: 200 judges."""

    async def score() -> tuple[list[Group], list[Group]]:
        async with AnyJudge() as server:
            judge_settings = make_settings(
                server.url,
                criteria={criterion: 1.0},
                votes=2,
                attempts=2,
                call_timeout_s=2.0,
                concurrency=16,
                deadline_s=DEADLINE_S,
                schedule=ScheduleSettings(schedule),
            )
            groups = [make_group(i, *case) for i, case in enumerate(cases)]
            async with Judge(judge_settings) as judge:
                # Whether a whole server is sick, and others wait for it, is not the question here.
                judge._client.pool._policy = RetryPolicy(2, first_s=0.001, longest_s=0.01, breaker_failures=10**6)
                return groups, await judge.score(groups)

    begin = time.monotonic()
    groups, judged = asyncio.run(score())
    assert time.monotonic() - begin < DEADLINE_S + 20.0
    for group, result in zip(groups, judged, strict=True):
        check(group, result, criterion)
