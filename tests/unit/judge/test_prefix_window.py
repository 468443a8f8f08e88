"""Small contexts: how much of a prefix is shown, and that what is cut or dropped is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_judge import FakeJudge
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import make_group, make_settings
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.judge import ClientSettings, Endpoint, Judge, Rewriter, RewriterSettings
from megatron_sip.judge.prefix_window import (
    MARGIN_TOKENS,
    MIN_PREFIX_TOKENS,
    PrefixWindow,
    cut_prefix,
    estimated_tokens,
)
from megatron_sip.judge.probe import read_facts
from megatron_sip.records import Group

LONG = " ".join(f"word{k}" for k in range(2000))


@given(st.text(max_size=300), st.integers(1, 400), st.integers(0, 200), st.integers(1, 400))
def test_what_is_shown_is_an_end_of_the_prefix_that_fits(prefix: str, context: int, beside: int, chars: int) -> None:
    def count(text: str) -> int:
        return len(text.encode("utf-8", "replace"))

    shown = PrefixWindow(chars, context, count).shown(prefix, lambda: beside)
    left = context - beside - MARGIN_TOKENS
    if shown is None:
        assert left < MIN_PREFIX_TOKENS
        assert count(cut_prefix(prefix, chars)) > left
    else:
        assert prefix.endswith(shown)
        assert len(shown) <= chars
        assert count(shown) <= max(left, 0)


def test_a_context_that_holds_everything_cuts_nothing() -> None:
    assert PrefixWindow(10**6, 10**6).shown(LONG, lambda: 500) == LONG
    assert PrefixWindow(10**6).shown(LONG, lambda: 10**9) == LONG  # not known: the server will say


def test_most_of_a_small_context_is_used() -> None:
    shown = PrefixWindow(10**6, 1000).shown(LONG, lambda: 400)
    assert shown is not None
    assert 0.9 * 584 < estimated_tokens(shown) <= 584


@pytest.mark.parametrize(
    ("kind", "report", "models", "expected"),
    [
        ("openai", None, {"data": [{"id": "m", "max_model_len": 4096}]}, (None, None, 4096)),
        ("openai", None, {"data": [{"id": "other", "max_model_len": 9}, {"id": "m"}]}, (None, None, None)),
        ("openai", None, {"data": [7]}, (None, None, None)),
        ("openai", None, "nonsense", (None, None, None)),
        ("sglang", {"model_path": "/m", "served_model_name": "n"}, None, ("n", "/m", None)),
        ("sglang", {"model_path": "/m", "tokenizer_path": "/t"}, {"data": [{"max_model_len": 512}]}, ("/m", "/t", 512)),
        ("sglang", None, None, (None, None, None)),
    ],
)
def test_what_servers_report(kind: str, report: object, models: object, expected: tuple[object, ...]) -> None:
    facts = read_facts(kind, "m", report, models)  # type: ignore[arg-type]
    assert (facts.model, facts.tokenizer, facts.context_tokens) == expected


def test_a_model_that_is_trained_into_the_same_folder_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)

    def weights() -> str | None:
        relative, absolute = (
            read_facts("sglang", "m", {"model_path": path}, None).weights for path in (tmp_path.name, str(tmp_path))
        )
        assert relative == absolute
        return absolute

    assert weights() is None
    (tmp_path / "model.safetensors").write_bytes(b"old")
    first = weights()
    assert first == weights() is not None
    (tmp_path / "model.safetensors").write_bytes(b"newer")
    assert weights() not in (first, None)
    assert read_facts("sglang", "m", {"model_path": "org/name"}, None).weights is None


def long_group() -> Group:
    group = make_group(0, [0.4, 0.9])
    return replace(group, task=replace(group.task, prefix_text=LONG))


@pytest.mark.parametrize("reported", [True, False])
async def test_a_judge_of_small_context_sees_the_end_of_the_prefix(reported: bool) -> None:
    async with FakeJudge(context=2048 if reported else None) as server:
        endpoint = Endpoint(server.url, "openai", context_tokens=None if reported else 2048)
        async with Judge(make_settings(endpoints=(endpoint,))) as judge:
            await judge.check(5.0)
            [judged] = await judge.score([long_group()])
            assert judged.scores == [0.0, 1.0]
            assert judge.counters()["prefixes-cut"] == 1
        for shown in server.prompts:
            assert estimated_tokens(shown) + 512 < 2048
            assert "word1999\n[end prefix" in shown
            assert "word0 " not in shown


async def test_a_judge_without_room_for_any_prefix_drops_the_group() -> None:
    async with FakeJudge(context=900) as server, Judge(make_settings(server.url)) as judge:
        await judge.check(5.0)
        [judged] = await judge.score([long_group()])
        assert judged.dropped == "judge-context-too-short"
        assert server.requests == 0


@pytest.mark.parametrize(("context", "count"), [(700, "prefixes-cut"), (300, "dropped/context-too-short")])
async def test_a_rewriter_of_small_context(context: int, count: str) -> None:
    async with FakeJudge(
        answer=lambda prompt: "word1995 word1996 word1997 word1998 word1999 on", context=context
    ) as server:
        client = ClientSettings((Endpoint(server.url, "openai"),), call_timeout_s=1.0)
        async with Rewriter(RewriterSettings(client), byte_level_tokenizer(), 16) as rewriter:
            await rewriter.check(5.0)
            [made] = await rewriter.rewrite([long_group().task])
            assert rewriter.counters()[count] == 1
            assert (made is None) == (count != "prefixes-cut")
