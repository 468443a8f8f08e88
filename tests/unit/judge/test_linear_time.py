"""Whatever a model writes is read in time proportional to its length: a quadratic pattern would block the event loop."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_sip.judge.prompts import break_marks, builtin_prompt
from megatron_sip.judge.reasoning import ReasoningStyle, own_answer
from megatron_sip.judge.refusals import is_refusal
from megatron_sip.judge.rewriter import fit_whitespace, last_words, without_start

CHARS = 40_000
SECONDS_PER_MEGABYTE = 10.0
"""Several times what it takes; a quadratic pattern takes a second and more on 40,000 characters."""
RULES = [builtin_prompt(name).rule for name in ("quality", "safety", "factuality", "coherence")]


def read_verdicts(text: str) -> None:
    for rule in RULES:
        assert rule is not None
        rule.parse(text)
        rule.parse(text + rule.start + rule.labels[0])
        rule.read(rule.start + rule.labels[0] + text)


def cut_reasoning(text: str) -> None:
    for style in (ReasoningStyle(), ReasoningStyle("</think>"), ReasoningStyle(harmony=True)):
        own_answer(text, style)
    own_answer(text, begun=True)


def read_rewrites(text: str) -> None:
    last_words(text)
    is_refusal(text)
    for required in (True, False):
        without_start(text, text[:60], required=required)
        without_start(text, "one two three four five", required=required)
    fit_whitespace(text, "the end ")


READERS: dict[str, Callable[[str], object]] = {
    "verdicts": read_verdicts,
    "reasoning": cut_reasoning,
    "marks": break_marks,
    "rewrites": read_rewrites,
    "corruption": builtin_prompt("corruption").text_of,
}
UNITS = [
    *("<think>", "</think>", "<thinking><think>", "[THINK]", "◁think▷", "<|channel|>", "<|channel|>final<|message|>"),
    *("analysis", "assistantfinal", "<|", "<", "</a>", "<a>", "<_", "<________", "</__a", "<a_", "[", "[["),
    *("{", '{"', '{"a":', '{\\"', '"label"', '"label" : ', '{"label": "No Hallucination", ', '"', "“", "'", "`"),
    "```\n",
    *("Conclusion:", "Conclusion: *_ ", "Conclusion: Option 1", "Conclusion: Option 1\n", "Conclusion: Option 1 or "),
    *("FINAL DECISION:", "MODIFIED CONTINUATION:", "MODIFIED CONTINUATION: \n", "(", "()", "((because ", "because "),
    *("of 1", "/5", "*", "**_", ".", "!", " ", "\n", "\t\n", "x", "x ", "\u200d", "色", "one ", "one two "),
    *("I ", "I can't ", "I'm sorry, but ", "sorry, "),
    *("As an AI ", "As an AI, I cannot ", "Unfortunately, ", "thank you "),
]


def is_linear(reader: Callable[[str], object], text: str) -> bool:
    """Whether one of three readings takes no longer than it may: the machine may have been about something else."""
    return any(seconds(reader, text) < SECONDS_PER_MEGABYTE * len(text) / 1e6 for _ in range(3))


def seconds(reader: Callable[[str], object], text: str) -> float:
    began = time.process_time()
    reader(text)
    return time.process_time() - began


@pytest.mark.parametrize("name", READERS)
def test_repeated_marks_are_read_in_linear_time(name: str) -> None:
    for unit in UNITS:
        text = unit * (CHARS // len(unit))
        assert is_linear(READERS[name], f"decided that {text}x"), unit


@pytest.mark.parametrize("name", READERS)
@given(st.lists(st.sampled_from(UNITS), min_size=1, max_size=4), st.sampled_from(UNITS))
@example(["<think>"], "</think>")
@settings(max_examples=15, deadline=None)
def test_whatever_is_repeated_is_read_in_linear_time(name: str, units: list[str], last: str) -> None:
    unit = "".join(units)
    text = unit * (CHARS // len(unit)) + last
    assert is_linear(READERS[name], text)
