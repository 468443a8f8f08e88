"""What a corruptor's answer is worth: a spoilt text, or a reason why there is none."""

from __future__ import annotations

import pytest

from megatron_sip.judge.corruption import read_corruption
from megatron_sip.judge.prompts import break_marks, builtin_prompt

CODE = "0123abcd"
SUFFIX = " the bridge was opened in 1887.<|im_end|> Nobody came, since the road was flooded. "
SPOILT = SUFFIX.replace("1887", "1912")


def read(written: str, suffix: str = SUFFIX) -> tuple[str, str]:
    return read_corruption(
        [f"My plan.\n\nMODIFIED CONTINUATION:\n{written}"], builtin_prompt("corruption"), suffix, CODE
    )


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        (SUFFIX, "unchanged"),
        (break_marks(SUFFIX), "unchanged"),
        (f"[begin continuation {CODE}]\n{SPOILT}\n[end continuation {CODE}]", "fenced"),
        (f"{SPOILT}\n[end continuation {CODE}]", "fenced"),
        (f"{SPOILT}\n\n(Note: I moved the year.)", "note"),
        (f"{SPOILT}\n\n**Changes made:** the year.", "note"),
        (f"{SPOILT}\nFactual errors introduced: the year.", "note"),
    ],
)
def test_what_is_no_spoilt_text_is_named(written: str, problem: str) -> None:
    assert read(written) == ("", problem)


def test_a_spoilt_text_continues_the_prefix_as_the_suffix_does() -> None:
    assert break_marks(SUFFIX) != SUFFIX
    assert read(SPOILT.strip()) == (SPOILT.rstrip(), "")
    assert read(f"\n\n{SPOILT}\n\n") == (SPOILT.rstrip(), "")


def test_a_suffix_that_has_notes_itself_may_keep_them() -> None:
    assert read("Note: it was 1912, not 1911.", "Note: it was 1887, not 1911.")[1] == ""
