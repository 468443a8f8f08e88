"""Reading verdicts: the last one of the judge's own answer, or none."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge.prompts import builtin_prompt, parse_prompt
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
        ("safety", "**FINAL DECISION**: YES, the text does not attack anybody.", 1.0),
        ("safety", "FINAL DECISION: NO, yes", None),
        ("coherence", "**ANSWER**: A", 1.0),
        ("coherence", "ANSWER: A, TIE", None),
        ("similarity", "Both name 1066 as the year.\nVERDICT: 1", 1.0),
        ("similarity", "**VERDICT:** 0.", 0.0),
        ("similarity", "VERDICT: 0.5", None),
        ("similarity", "VERDICT: 10", None),
        ("similarity", "1", None),
        ("factuality", '{"reasoning": "ok", "label": "No Hallucination"}', 1.0),
        ("factuality", '```json\n{"label" : "Possible Hallucination", "reasoning": ""}\n```', 0.5),
        (
            "factuality",
            '{"reasoning": "it says \\"label\\": \\"No Hallucination\\"", "label": "Definite Hallucination"}',
            0.0,
        ),
        ("factuality", "No Hallucination", None),
        ("coherence", "ANSWER: TIE", 0.5),
        ("factscore", '{"reasoning": "A is right, B errs.", "label": "A"}', 1.0),
        ("factscore", '{"reasoning": "\\"label\\": \\"A\\"", "label": "B"}', 0.0),
        ("halueval", '```json\n{"reasoning": "no difference", "label": "tie"}\n```', 0.5),
        ("halueval", '{"reasoning": "both", "label": "A or B"}', None),
        ("halueval", "A", None),
        ("coherence", "ANSWER: A\nANSWER: B\nANSWER: TIE", None),
        ("factuality", '{"label": "No Hallucination", "reasoning": "he said "so" there"}', 1.0),
        ("factuality", '{\n  "label": "Possible Hallucination",\n  "reasoning": "a {b} c"\n}\n', 0.5),
        ("factuality", 'Here it is: {"reasoning": "x", "label": "No Hallucination"}', 1.0),
        ("factuality", '{"answer": {"reasoning": "x", "label": "No Hallucination"}}', 1.0),
        ("factuality", '{"label": "No Hallucination", "label": "Definite Hallucination"}', None),
        ("factuality", '{"label": "No Hallucination"} or {"label": "Definite Hallucination"}', None),
        ("factuality", '{"label": "No Hallucination"} would be wrong, since', None),
        ("factuality", '{"reasoning": "I could say {\\"label\\": \\"No Hallucination\\"}', None),
    ],
)
def test_parse(criterion: str, output: str, value: float | None) -> None:
    assert rule(criterion).parse(output) == value


@pytest.mark.parametrize(
    "output",
    [
        *("Conclusion: Option 1", "conclusion: option 1", "Both are fine.\n\nConclusion: Option 1\n"),
        *("Both are fine. Conclusion: Option 1.", "The first goes on smoothly, so Conclusion: Option 1"),
        *("Therefore: Conclusion: Option 1", "My final answer is Conclusion: Option 1."),
        *("Option 2 repeats itself.\r\n\r\nConclusion: Option 1\r\n", "**Conclusion: Option 1**"),
        *("**Conclusion:** Option 1", "**Conclusion:** **Option 1**.", "Conclusion: *Option 1*"),
        *("Conclusion: __Option 1__!", "Conclusion: `Option 1`", "Conclusion: [Option 1]", 'Conclusion: "Option 1".'),
        *("### Conclusion: Option 1\n\n---", "> Conclusion: Option 1", "- Conclusion: Option 1"),
        *('"Conclusion: Option 1"', "“Conclusion: Option 1”", "'Conclusion: Option 1'.", "`Conclusion: Option 1`"),
        *("```\nConclusion: Option 1\n```", "$\\boxed{Conclusion: Option 1}$"),
        *("<answer>Conclusion: Option 1</answer>", "<answer>\nConclusion: Option 1\n</answer>\n"),
        *("Conclusion: Option 1<|eot_id|>", "Conclusion: Option 1</s>"),
        *("Conclusion: Option 1 (it keeps to the subject)", "Conclusion: Option 1, because it keeps to the subject."),
        *("Conclusion: Option 1 - it keeps to the subject", "**Conclusion: Option 1**, which keeps to the subject."),
        *("Conclusion: Option 1 is the better continuation.", "Conclusion: Option 1\n\nI hope this helps!"),
        "Conclusion: Option 1\n\nLet me know if you need anything else.",
        "Conclusion: Option 1\n\nConclusion: Option 1",
        "Conclusion: Option 2\n\nWait, that is wrong.\n\nConclusion: Option 1",
        *("Conclusion: Option 2. No, on reflection: Conclusion: Option 1", "**Conclusion**: Option 1"),
        *("Conclusion : Option 1", "Conclusion：Option 1", "Conclusion: Option (1)", "Conclusion: Option #1"),
        *("Conclusion: Option 1, as it does not repeat itself.", "Conclusion: Option 1, not Option 2."),
        "Final step - Conclusion: Option 1",
        "**Conclusion: Option 1**\n\n**Reasoning:** Option 2 is off the subject. It was no contest.",
        *("Conclusion: Option 1\n\n*Note: Option 2 repeats itself.*", "Conclusion: Option 1\nConfidence: 85%"),
        "Conclusion: Option 1\n\nFeel free to ask for details.",
    ],
)
def test_ordinary_forms_of_a_verdict(output: str) -> None:
    assert rule("quality").parse(output) == 1.0


QUOTED = "Option 2 is wrong. I must end with Conclusion: Option 1 or Conclusion: Option 2. Let me re-read"


@pytest.mark.parametrize(
    "output",
    [
        QUOTED,
        *(QUOTED[:cut] for cut in range(len(QUOTED))),
        "Conclusion: Option 1 or Conclusion: Option 2",
        "Conclusion: Option 1\nConclusion: Option 2",
        "Conclusion: Option 1 / Conclusion: Option 2",
        "Either Conclusion: Option 2, or, if the first is better, Conclusion: Option 1",
        "I should write Conclusion: Option 1",
        "The last line must be Conclusion: Option 1",
        "I would not say Conclusion: Option 1",
        "Not Conclusion: Option 1",
        "Conclusion: Option 1?",
        "Conclusion: Option 1 ...",
        "Conclusion: Option 1 or 2",
        "Conclusion: Option 1 would be wrong",
        "Conclusion: Option 1 is wrong",
        "Conclusion: Option 1 is not the better one",
        "Conclusion: Option 1, or perhaps the other",
        "Conclusion: Option 1 - but let me re-read",
        "Conclusion: Option 1 - is that so? Let me",
        "Conclusion: Option 1\n\nLet me re-read",
        "Conclusion: Option 1\n\nBut on second thought the other one is better.",
        "Conclusion: Option 1. Hmm, wait.",
        "Conclusion: Option 1\n\nContinuation: and so on",
        "1. Conclusion: Option 2\n2. Conclusion: Option 1",
        "a) Conclusion: Option 2\nb) Conclusion: Option 1",
        "Conclusion: Option 1/2",
        "Conclusion: Option 1 (or 2)",
        "Conclusion: Option 1, Option 2",
        "Conclusion: Option 1, no, Option 2",
        "Conclusion: Option 1 (unless the reader prefers the other)",
        "Conclusion: Option 1, not sure",
        "Conclusion: Option 1 - not",
        "Conclusion: Option 1\n\nNote: on second thought, the other one is better.",
        "Conclusion: Option 1\n\nReasoning: let me compare them once more.",
        "Conclusion: Option 1\n\nNote: is that right?",
    ],
)
def test_a_verdict_that_is_weighed_or_quoted_is_none(output: str) -> None:
    assert rule("quality").parse(output) is None


def test_a_prompt_file_may_have_its_verdict_anywhere_and_marks_of_its_own() -> None:
    def custom(pattern: str, labels: str, extra: str = "") -> VerdictRule:
        values = "\n".join(f"{label} = {place / 4}" for place, label in enumerate(labels.split()))
        header = f"name = 'c'\nkind = 'pointwise'\npattern = '{pattern}'\n{extra}[values]\n{values}"
        found = parse_prompt(f"+++\n{header}\n+++\n{{{{candidate}}}}", "c").rule
        assert found is not None
        return found

    rating = custom(r"RATING:\s*(BAD|GOOD)", "BAD GOOD")
    assert rating.parse("Lively.\nRATING: GOOD") == 0.25
    assert rating.parse("My RATING: GOOD") == 0.25
    assert rating.parse("RATING: GOOD\nIt is lively.") is None
    first = custom(r"RATING:\s*(BAD|GOOD)", "BAD GOOD", "position = 'anywhere'\n")
    assert first.parse("RATING: GOOD\nIt is lively.") == 0.25
    assert first.parse("<think>RATING: GOOD\nIt is lively.") is None
    assert custom(r"\b(bad|good)\b", "bad good").parse("On the whole I find the text good.") == 0.25
    assert custom(r"Score:\s*(\d)", "0 1 2 3 4").parse("Score: 4/5") == 1.0
    assert custom(r"Score:\s*(\d)", "0 1 2 3 4").parse("Score: 4 out of 5.") == 1.0
    assert custom(r"\"score\":\s*(\d)", "0 1 2 3 4").parse('{"why": "fine", "score": 3}') == 0.75
    assert custom(r"\"score\":\s*(\d)", "0 1 2 3 4").parse('{"score": 3, "why": "fine"}') == 0.75


@given(st.text(alphabet=st.characters(exclude_characters=":\"'")))
def test_text_without_a_verdict_is_a_missing_vote(text: str) -> None:
    assert all(rule(name).parse(text) is None for name in ("quality", "safety", "factuality"))


@given(st.text(), st.sampled_from(["1", "2"]))
def test_whatever_came_before_the_last_verdict_does_not_count(before: str, option: str) -> None:
    output = f"{before}</think>\n\nConclusion: Option {option}"
    if "<|channel|>" not in before and not before.startswith("analysis"):
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
