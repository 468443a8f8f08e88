"""Chat APIs that refuse a parameter, ignore n or leave parts of an answer out: each is asked and read as it wants."""

from __future__ import annotations

from typing import Any

import pytest
from fake_judge import FakeJudge, truthful_answer
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import make_group, make_settings

from megatron_sip.judge import Endpoint, Judge, ScheduleSettings
from megatron_sip.judge.dialect import Dialect

MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
NO_LOGPROBS = "You are not allowed to request logprobs from this model: 'logprobs' is not supported with this model."
SOFT = {"max_tokens": 5, "temperature": 1.0, "logprobs": True, "top_logprobs": 20}
HARD = {"max_tokens": 5, "temperature": 1.0, "top_p": 0.6, "n": 5}
NO_PLAIN = Dialect(without=frozenset({"logprobs", "top_logprobs"}))


def without(*names: str) -> Dialect:
    return Dialect(without=frozenset(names))


def reasoning_model(body: dict[str, Any]) -> str | None:
    if "max_tokens" in body:
        return MAX_TOKENS
    return NO_LOGPROBS if "logprobs" in body else None


@pytest.mark.parametrize(
    ("message", "body", "learnt"),
    [
        (MAX_TOKENS, HARD, Dialect(completion_limit=True)),
        ("max_tokens is deprecated, set max_completion_tokens", SOFT, Dialect(completion_limit=True)),
        ("'max_tokens' or 'max_completion_tokens' is too large: 99999", HARD, None),
        ("max_tokens is too large: 99999", HARD, None),
        (
            "This model's maximum context length is 8192 tokens. Reduce the length of messages or completion.",
            HARD,
            None,
        ),
        (NO_LOGPROBS, SOFT, NO_PLAIN),
        ("Unsupported parameter: 'logprobs'", SOFT, NO_PLAIN),
        ("logprobs is not enabled for this deployment", SOFT, NO_PLAIN),
        ("log probabilities are unavailable", SOFT, NO_PLAIN),
        ("This model does not support logprobs.", SOFT, NO_PLAIN),
        ("top_logprobs must be between 0 and 5", SOFT, Dialect(top_logprobs=5)),
        ("Invalid value for 'top_logprobs': 20 is greater than the maximum of 8.", SOFT, Dialect(top_logprobs=8)),
        ("Requested sample logprobs of 20, which is greater than max allowed: 5", SOFT, Dialect(top_logprobs=5)),
        ("top_logprobs must be 0", SOFT, NO_PLAIN),
        (
            "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
            HARD,
            without("top_p"),
        ),
        ('{"detail":[{"loc":["body","top_p"],"msg":"Extra inputs are not permitted"}]}', HARD, without("top_p")),
        ("Nucleus sampling is not available", HARD, without("top_p")),
        ("Unsupported value: 'temperature' does not support 0.0 with this model.", HARD, without("temperature")),
        ('{"error":{"message":"Unsupported value","param":"n"}}', HARD, without("n")),
        ("n must be 1", HARD, without("n")),
        ("Only one completion is supported", HARD, without("n")),
        ("Number of choices: n > 1 is not supported", HARD, without("n")),
        ("n: only 1 is supported", HARD, without("n")),
        ("Unrecognized request argument supplied: n", HARD, without("n")),
        ("a number of completions > 1 is unsupported", HARD, without("n")),
        ("topLogprobs must be in [1, 10]", SOFT, Dialect(top_logprobs=10)),
        ('{"error":"no such model\\n: see the list"}', HARD, None),
        ("Incorrect API key", HARD, None),
        ("The content was flagged", HARD, None),
        ("top_p is not supported", SOFT, None),  # it was not sent
    ],
)
def test_refusals_are_understood(message: str, body: dict[str, Any], learnt: Dialect | None) -> None:
    assert Dialect().after(message, body) == learnt


@given(st.text(max_size=200), st.lists(st.sampled_from(["top_p", "n must be 1", "logprobs", "max 5", "temperature"])))
def test_any_server_is_obeyed_only_a_few_times(text: str, words: list[str]) -> None:
    """However it refuses, each refusal leaves a smaller request."""
    dialect, body = Dialect(), {**HARD, **SOFT}
    for _ in range(9):
        found = dialect.after(" ".join([text, *words, "max_completion_tokens"]), dialect.adapted(body))
        if found is None:
            return
        assert found != dialect
        dialect = found
    pytest.fail("it never ends")


@pytest.mark.parametrize("verdict", ["hard", "soft"])
async def test_a_reasoning_model_is_asked_as_it_wants(verdict: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings_changes = {"default_verdict": verdict, "schedule": ScheduleSettings("all_pairs"), "concurrency": 2}
    async with FakeJudge(refuses=reasoning_model) as server:
        async with Judge(make_settings(server.url, **settings_changes)) as judge:
            await judge.check(5.0)
            judged = await judge.score([make_group(i, [0.4, 0.9, 0.1]) for i in range(20)])
        assert all(group.scores == pytest.approx([0.5, 1.0, 0.0]) for group in judged)
        refused = [body for body in server.bodies if reasoning_model(body)]
        assert 1 <= len(refused) <= 4  # at most what was in flight before the first refusals were read
        assert server.bodies[-1]["max_completion_tokens"] == 512
    assert 1 <= caplog.text.count("requests are sent") <= 2


async def test_a_server_that_goes_on_refusing_is_not_asked_for_ever() -> None:
    async with FakeJudge(answer=truthful_answer, refuses=lambda body: MAX_TOKENS) as server:
        async with Judge(make_settings(server.url)) as judge:
            [judged] = await judge.score([make_group(0, [0.4, 0.9])])
        assert judged.dropped == "judge-quality-rejected"
        assert server.requests == 8  # both orders, each once more, each twice


async def test_what_did_not_help_is_not_kept() -> None:
    """A refused text that talks about parameters must not change how all others are asked."""

    def refuses(body: dict[str, Any]) -> str | None:
        prompt = body["messages"][0]["content"]
        return "flagged: 'the top_p and n must be 1'" if "Document 0 " in prompt else None

    async with FakeJudge(refuses=refuses) as server:
        async with Judge(make_settings(server.url, votes=4)) as judge:
            first, second = await judge.score([make_group(0, [0.4, 0.9]), make_group(1, [0.4, 0.9])])
            await judge.score([make_group(2, [0.4, 0.9])])
        assert (first.scores, second.scores) == (None, [0.0, 1.0])
        assert (server.bodies[-1]["top_p"], server.bodies[-1].get("n", 1) > 1) == (0.6, True)


def test_parameters_at_their_defaults_are_not_sent() -> None:
    from megatron_sip.judge.calls import GenerateCall
    from megatron_sip.judge.wire import openai_body

    endpoint = Endpoint("http://a", "openai", "m")
    assert set(openai_body(GenerateCall("q", ("p",), 1, 5, 1.0, 1.0), endpoint)) == {
        *("model", "messages", "max_tokens", "temperature")
    }


@pytest.mark.parametrize("refused", [False, True])
async def test_a_server_that_ignores_n_is_asked_singly(refused: bool, caplog: pytest.LogCaptureFixture) -> None:
    def one_only(body: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
        return {**full, "choices": full["choices"][:1]}

    def refuses(body: dict[str, Any]) -> str | None:
        return "n must be 1" if refused and "n" in body else None

    async with FakeJudge(edits=one_only, refuses=refuses) as server:
        async with Judge(make_settings(server.url, votes=6)) as judge:
            [first] = await judge.score([make_group(0, [0.4, 0.9])])
            [second] = await judge.score([make_group(1, [0.4, 0.9])])
        assert first.scores == second.scores == [0.0, 1.0]
        assert first.votes == {"quality": [6, 6]}
        answered = [body for body in server.bodies if not refuses(body)]
        assert len(answered) == 12
    assert caplog.text.count("gave 1 of 3 answers: the others are asked for singly") == 1


async def test_choices_beyond_those_asked_for_are_no_votes() -> None:
    """Also where the server was asked for one, because it refuses n."""
    wrong = {"finish_reason": "stop", "message": {"role": "assistant", "content": "Conclusion: Option 1"}}

    def one_more(body: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
        return {**full, "choices": [*full["choices"], wrong]}

    server = FakeJudge(edits=one_more, refuses=lambda body: "n must be 1" if "n" in body else None)
    async with server, Judge(make_settings(server.url, votes=6)) as judge:
        [judged] = await judge.score([make_group(0, [0.4, 0.9])])
    assert judged.scores == [0.0, 1.0]
    assert judged.votes == {"quality": [6, 6]}


async def test_a_choice_without_content_is_one_missing_vote(caplog: pytest.LogCaptureFixture) -> None:
    def filtered(body: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
        lost = [
            {"finish_reason": "content_filter", "message": {"role": "assistant"}},
            {"finish_reason": "content_filter"},
        ]
        return {**full, "choices": [*full["choices"][2:], *lost]}

    async with FakeJudge(edits=filtered) as server:
        async with Judge(make_settings(server.url, votes=10)) as judge:
            [judged] = await judge.score([make_group(0, [0.4, 0.9])])
        assert judged.scores == [0.0, 1.0]
        assert judged.votes == {"quality": [6, 6]}
        assert [body["n"] for body in server.bodies] == [5, 5, 2, 2]  # what was missing is asked for once more
    counters = judge.counters()
    assert not [name for name in counters if name.startswith(("failed", "breaker", "retries"))]


def test_all_that_a_content_may_be() -> None:
    from megatron_sip.judge.openai_reply import choices_of, content_of

    part = {"type": "text", "text": "Conclusion: "}
    cases: list[tuple[Any, str]] = [
        ({"content": "Yes"}, "Yes"),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": [part, {"type": "output_text", "text": "Option 1"}, {"type": "reasoning", "text": "No"}]},
         "Conclusion: Option 1"),
        ({"content": [part, {"type": "image"}, None, 5, "x"]}, "Conclusion: x"),
        ({"content": 5}, ""),
        ({"content": {"text": "x"}}, "x"),
    ]  # fmt: skip
    for message, text in cases:
        assert content_of(choices_of({"choices": [{"message": message}]})[0]) == text
