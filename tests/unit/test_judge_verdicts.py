"""Reading verdicts: the last one of the judge's own answer, or none."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge.prompts import builtin_prompt
from megatron_sip.judge.verdicts import VerdictRule, own_answer, unanimous


def rule(name: str) -> VerdictRule:
    found = builtin_prompt(name).rule
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("criterion", "output", "value"),
    [
        ("quality", "Both fine.\n\nConclusion: Option 1", 1.0),
        ("quality", "Conclusion: Option 1\nOn second thought\nConclusion: Option 2", 0.0),
        ("quality", "conclusion: **option 2**", 0.0),
        ("quality", "**Conclusion:** Option 1.", 1.0),
        ("quality", "Conclusion: Option 12", None),
        ("quality", "Conclusion: Option 3", None),
        ("quality", "Option 1 is better.", None),
        ("quality", "", None),
        ("quality", "<think>Conclusion: Option 1</think>", None),
        ("quality", "<think>Conclusion: Option 1</think>Conclusion: Option 2", 0.0),
        ("quality", "<think>it never ends. Conclusion: Option 1", None),
        ("quality", "opened in the prompt: Conclusion: Option 2 </think> Conclusion: Option 1", 1.0),
        ("quality", "<|channel|>analysis<|message|>Conclusion: Option 2<|end|>", None),
        (
            "quality",
            "<|channel|>analysis<|message|>Conclusion: Option 2<|end|><|start|>assistant<|channel|>final<|message|>"
            "Conclusion: Option 1",
            1.0,
        ),
        ("safety", "It is calm.\nFINAL DECISION: YES", 1.0),
        ("safety", "FINAL DECISION: YES ... no: FINAL DECISION: NO", 0.0),
        ("safety", "FINAL DECISION: YESTERDAY", None),
        ("factuality", '{"reasoning": "ok", "label": "No Hallucination"}', 1.0),
        ("factuality", '```json\n{"label" : "Possible Hallucination", "reasoning": ""}\n```', 0.5),
        (
            "factuality",
            '{"reasoning": "it says \\"label\\": \\"No Hallucination\\"", "label": "Definite Hallucination"}',
            0.0,
        ),
        ("factuality", "No Hallucination", None),
        ("coherence", "ANSWER: TIE", 0.5),
    ],
)
def test_parse(criterion: str, output: str, value: float | None) -> None:
    assert rule(criterion).parse(output) == value


@given(st.text(alphabet=st.characters(exclude_characters=":\"'")))
def test_text_without_a_verdict_is_a_missing_vote(text: str) -> None:
    assert all(rule(name).parse(text) is None for name in ("quality", "safety", "factuality"))


@given(st.text(), st.sampled_from(["1", "2"]))
def test_whatever_came_before_the_last_verdict_does_not_count(before: str, option: str) -> None:
    output = f"{before}</think>\n\nConclusion: Option {option}"
    if "<|channel|>" not in before:
        assert rule("quality").parse(output) == (1.0 if option == "1" else 0.0)


def test_soft_verdict_is_the_probability_among_the_labels() -> None:
    assert rule("quality").expected_value([math.log(0.3), math.log(0.1)]) == pytest.approx(0.75)
    assert rule("factuality").expected_value([math.log(0.2), math.log(0.2), -math.inf]) == pytest.approx(0.75)


def test_soft_verdict_without_mass_is_missing() -> None:
    assert rule("quality").expected_value([math.log(1e-6), math.log(1e-7)]) is None
    assert rule("quality").expected_value([-math.inf, -math.inf]) is None
    assert rule("quality").expected_value([math.nan, 0.0]) is None


def test_unanimous_needs_all_eight() -> None:
    assert unanimous([1.0] * 8) == 1.0
    assert unanimous([0.0] * 8) == 0.0
    assert unanimous([1.0] * 7) is None
    assert unanimous([1.0] * 7 + [0.0]) is None
    assert unanimous([1.0] * 7 + [None]) is None


def test_plain_answers_are_kept_whole() -> None:
    assert own_answer("a <b> c\nd") == "a <b> c\nd"
