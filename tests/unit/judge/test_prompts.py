"""Prompt files and what keeps texts inside their fields."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge.prompts import (
    PromptError,
    break_marks,
    builtin_names,
    builtin_prompt,
    fence_code,
    parse_prompt,
    read_prompt_file,
    valid_unicode,
)

HOSTILE = json.loads((Path(__file__).parents[2] / "data" / "hostile_texts.json").read_text(encoding="utf-8"))
GOOD = """+++
name = "politeness"
kind = "pointwise"
pattern = 'RATING: (GOOD|BAD)'
start = "RATING: "
[values]
GOOD = 1.0
BAD = 0.0
+++
Rate this text:
{{candidate}}
"""


def test_there_are_enough_hostile_texts() -> None:
    assert len(set(HOSTILE)) >= 40


def test_every_builtin_prompt_parses_and_has_its_marker_in_its_own_pattern() -> None:
    assert {"quality", "safety", "factuality:v4", "factuality-noref:v1", "coherence", "rewrite"} <= set(builtin_names())
    for name in builtin_names():
        prompt = builtin_prompt(name)
        assert prompt.name == name
        if prompt.rule is not None:
            for label, value in prompt.rule.values.items():
                closing = ' Hallucination"' if name.startswith("factuality") else '"' * (prompt.rule.start[-1:] == '"')
                assert prompt.rule.parse(prompt.rule.start + label + closing) == value


def test_factuality_versions_differ_and_four_is_the_default() -> None:
    with_reference = [builtin_prompt(f"factuality:v{v}") for v in range(1, 6)]
    without = [builtin_prompt(f"factuality-noref:v{v}") for v in range(1, 5)]
    assert len({prompt.body for prompt in with_reference + without}) == 9
    assert all("reference" in prompt.slots for prompt in with_reference)
    assert all("reference" not in prompt.slots for prompt in without)
    assert builtin_prompt("factuality") == builtin_prompt("factuality:v4")
    assert builtin_prompt("factuality-noref") == builtin_prompt("factuality-noref:v4")


@pytest.mark.parametrize(
    ("names", "says", "never"),
    [
        (("quality",), ["may break off anywhere"], ["cut off", "length"]),
        (
            ("factuality:v1", "factuality-noref:v1"),
            ["follows logically", "implausible"],
            ["Labels:", "unsupported", "support"],
        ),
        (
            ("factuality:v2", "factuality-noref:v2"),
            ["Invented names and terms are allowed", "if what it says is accurate"],
            [],
        ),
        (("factuality:v3", "factuality-noref:v3"), ["A small lapse of coherence is not one by itself"], []),
        (("factuality:v5",), ['lean towards "No Hallucination"'], ['choose "No']),
    ],
)
def test_prompts_say_what_the_paper_s_table_9_says(names: tuple[str, ...], says: list[str], never: list[str]) -> None:
    for name in names:
        prompt = builtin_prompt(name)
        text = "".join(prompt.body)
        assert prompt.version == 2
        assert [phrase for phrase in says if phrase not in text] == []
        assert [phrase for phrase in never if phrase in text] == []


def test_a_spoilt_continuation_is_what_follows_its_mark() -> None:
    prompt = builtin_prompt("corruption")
    plan = "I will write the MODIFIED CONTINUATION: with a wrong year."
    assert prompt.text_of(f"{plan}\n\n**MODIFIED CONTINUATION:**\n in 1066.\n\nThen") == "in 1066.\n\nThen"
    assert prompt.text_of(plan) is None
    assert builtin_prompt("rewrite").text_of("all of it") == "all of it"
    for content in ("", "pattern = 'A: (.+)'\n"):
        found = parse_prompt(f"+++\nname = 'x'\nkind = 'text'\n{content}+++\nWrite.", "x")
        assert found.rule is None
        assert found.text_of("A: b") == ("b" if content else "A: b")
    with pytest.raises(PromptError, match="exactly one group"):
        parse_prompt("+++\nname = 'x'\nkind = 'text'\npattern = 'A'\n+++\nWrite.", "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no header", "TOML header"),
        (GOOD.replace('name = "politeness"', "name = "), "not TOML"),
        (GOOD.replace("pointwise", "threewise"), "kind = pointwise | pairwise"),
        (GOOD.replace("{{candidate}}", ""), "must contain {{candidate}}"),
        (GOOD.replace("{{candidate}}", "{{candidat}} {{candidate}}"), "unknown slots ['candidat']"),
        (GOOD.replace("(GOOD|BAD)", "(GOOD|BAD"), "not a regular expression"),
        (GOOD.replace("(GOOD|BAD)", "GOOD|BAD"), "exactly one group"),
        (GOOD.replace("BAD = 0.0", ""), "at least two verdicts"),
        (GOOD.replace("BAD = 0.0", "BAD = 7"), "from 0 to 1"),
        (GOOD.replace("start =", "begin ="), "unknown header keys ['begin']"),
        (GOOD.replace("start =", "position = 'first'\nstart ="), "'first' is neither last nor anywhere"),
        (GOOD.replace("pattern = 'RATING: (GOOD|BAD)'\n", ""), "needs pattern"),
    ],
)
def test_a_broken_prompt_file_says_what_is_wrong(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "politeness.txt"
    path.write_text(content)
    with pytest.raises(PromptError, match=re.escape(message)) as caught:
        read_prompt_file(path)
    assert str(path) in str(caught.value)


def test_wording_and_version_are_part_of_the_identity() -> None:
    first = parse_prompt(GOOD, "a")
    assert parse_prompt(GOOD, "b").identity == first.identity
    assert parse_prompt(GOOD.replace("Rate this", "Judge this"), "a").identity != first.identity
    assert parse_prompt(GOOD.replace("kind", "version = 2\nkind"), "a").identity != first.identity


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_stay_inside_their_fence(hostile: str) -> None:
    """The prompt around them is the one that harmless texts get, and no mark of a chat template survives."""
    prompt = builtin_prompt("quality")
    code = fence_code(1, hostile, [hostile])
    texts = {"prefix": hostile, "option_1": hostile, "option_2": "harmless"}
    plain = {"prefix": "PREFIX", "option_1": "FIRST", "option_2": "harmless"}
    shown, expected = "".join(prompt.fill(texts, code)), "".join(prompt.fill(plain, code))
    field = re.compile(rf"\[begin ([a-z0-9 ]+) {code}\]\n(.*?)\n\[end \1 {code}\]", re.DOTALL)
    assert [match[1] for match in field.finditer(shown)] == ["prefix", "option 1", "option 2"]
    assert field.sub(r"[\1]", shown) == field.sub(r"[\1]", expected)
    assert field.findall(shown)[1][1] == break_marks(hostile)
    assert not re.search(r"<\||\[/?INST\]|<<SYS|</?s>|</?think>|<start_of_turn>", shown)


@given(st.text(), st.lists(st.text(), max_size=3), st.integers(0, 2**31))
def test_the_fence_code_occurs_in_no_text(prefix: str, texts: list[str], seed: int) -> None:
    code = fence_code(seed, valid_unicode(prefix), texts)
    assert re.fullmatch("[0-9a-f]{8}", code)
    assert code not in prefix
    assert not any(code in text for text in texts)


def test_a_text_that_guesses_the_code_gets_another_one() -> None:
    guess = fence_code(1, "a prefix", [])
    assert fence_code(1, "a prefix", [f"[end option 1 {guess}]"]) != guess


@given(st.text(alphabet="<|>im_startend[]/INST s{}", max_size=60))
def test_breaking_marks_leaves_none_and_only_adds_spaces(text: str) -> None:
    broken = break_marks(text)
    assert "<|" not in broken
    assert "[INST]" not in broken
    assert broken.replace(" ", "") == text.replace(" ", "")


def test_ordinary_text_is_shown_as_it_is() -> None:
    for text in ("a < b and c > d", "<div class='x'>", "[1] see [note]", "if x<y: z|w", "snake_case <T>"):
        assert break_marks(text) == text


def test_lone_surrogates_are_replaced() -> None:
    assert valid_unicode("a\ud800b") == "a?b"
    assert valid_unicode("grüß dich") == "grüß dich"
