"""Thoughts that a teacher inserts: the text around them stays the original, or the answer is dropped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_judge import FakeJudge
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.judge.prompts import builtin_prompt
from megatron_sip.judge.settings import ClientSettings, Endpoint, SettingsError
from megatron_sip.judge.thought_writer import Thought, ThoughtSettings, ThoughtWriter, read_thoughts, with_thoughts

TEXT = "We have 3 apples.\n\n  Two are eaten, so one is left."


def thought(text: str) -> str:
    return f"[[thought]]{text}[[/thought]]"


@pytest.mark.parametrize(
    ("answer", "thoughts"),
    [
        (f"We have 3 apples.{thought('3 - 2')}\n\n  Two are eaten, so one is left.", [Thought(17, "3 - 2")]),
        # white space next to a thought and around the whole is the teacher's affair
        (f"\nWe have 3 apples.\n\n{thought(' a ')} Two are eaten, so one is left.\n", [Thought(17, "a")]),
        (
            f"We have 3 apples. {thought('a')} \n {thought('b')}Two are eaten, so one is left.",
            [Thought(17, "a"), Thought(17, "b")],
        ),
        (f"{thought('a')}{TEXT} {thought('b')}", [Thought(0, "a"), Thought(len(TEXT), "b")]),
        (TEXT.replace("so", f"{thought('x [1]')}so"), [Thought(35, "x [1]")]),
    ],
)
def test_thoughts_are_found_in_the_original(answer: str, thoughts: list[Thought]) -> None:
    assert read_thoughts([answer], TEXT) == (thoughts, "")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "failed"),
        ([], "failed"),
        ([None], "unfinished"),
        ([TEXT], "no-thought"),
        (["I'm sorry, but I can't help with that."], "refused"),
        ([f"We have 4 apples.{thought('a')}\n\n  Two are eaten, so one is left."], "text-changed"),
        ([f"Here it is:\n{TEXT}{thought('a')}"], "text-changed"),
        ([f"{TEXT}{thought('a')} Done."], "text-changed"),
        ([f"We have 3 apples.{thought('a')}"], "text-changed"),  # cut short
        ([f"We have 3 apples.{thought('a')}\n\nTwo are eaten,  so one is left."], "text-changed"),
        ([TEXT + thought(" \n")], "empty-thought"),
        ([f"{TEXT}[[thought]]open"], "unpaired-marks"),
        ([f"{TEXT}[[thought]]a{thought('b')}[[/thought]]"], "unpaired-marks"),
    ],
)
def test_every_other_answer_is_dropped_for_its_reason(answer: list[str | None] | None, problem: str) -> None:
    assert read_thoughts(answer, TEXT) == ([], problem)


texts = st.text(alphabet="ab \n.é", min_size=1, max_size=30)


@given(texts, st.lists(st.tuples(st.integers(0, 30), st.text(alphabet="xy z", min_size=1, max_size=5)), max_size=4))
def test_without_its_thoughts_a_text_is_the_original(text: str, inserted: list[tuple[int, str]]) -> None:
    """Whatever the teacher inserted and wherever: what is written is the original, and the thoughts in their order."""
    inserted = sorted((min(place, len(text)), inner) for place, inner in inserted)
    answer, done = "", 0
    for place, inner in inserted:
        answer += text[done:place] + thought(inner)
        done = place
    thoughts, problem = read_thoughts([answer + text[done:]], text)
    if problem:
        assert problem == ("no-thought" if not inserted else "empty-thought")
        return
    assert [made.text for made in thoughts] == [inner.strip() for _, inner in inserted]
    for made, (place, _) in zip(thoughts, inserted, strict=True):
        assert text[min(made.place, place) : max(made.place, place)].strip() == ""
    written = with_thoughts(text, thoughts, "<think>", "</think>")
    assert re.sub(r"<think>.*?</think>", "", written, flags=re.DOTALL) == text
    assert re.findall(r"<think>(.*?)</think>", written, flags=re.DOTALL) == [made.text for made in thoughts]


async def test_a_teacher_is_asked_once_and_its_answer_kept(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return TEXT.replace("so", f"{thought('3 - 2 = 1')}so")

    async with FakeJudge(answer=answer) as server:
        client = ClientSettings((Endpoint(server.url, "openai"),), cache_path=tmp_path / "answers.sqlite")
        for _ in range(2):
            async with ThoughtWriter(ThoughtSettings(client)) as writer:
                await writer.check(5.0)
                assert await writer.think(TEXT) == ([Thought(35, "3 - 2 = 1")], "")
                writer.flush()
    assert len(asked) == 1
    assert TEXT in asked[0]


@pytest.mark.parametrize("text", ["Say <|im_start|> now.", "a [[thought]] b", "half a \ud800 pair"])
async def test_a_text_that_would_be_shown_otherwise_than_it_is_is_not_asked_about(text: str) -> None:
    writer = ThoughtWriter(ThoughtSettings(ClientSettings((Endpoint("http://nobody", "openai"),))))
    assert await writer.think(text) == ([], "marks-in-text")


async def test_a_chunk_that_the_context_does_not_hold_is_counted() -> None:
    async with FakeJudge(context=500) as server:
        client = ClientSettings((Endpoint(server.url, "openai"),))
        async with ThoughtWriter(ThoughtSettings(client, max_tokens=100)) as writer:
            await writer.check(5.0)
            assert await writer.think("many words " * 100) == ([], "context-too-short")


@pytest.mark.parametrize("changes", [{"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}])
def test_impossible_settings(changes: dict) -> None:
    with pytest.raises(SettingsError, match="--think-temperature must be"):
        ThoughtSettings(ClientSettings((Endpoint("http://nobody"),)), **changes)


def test_the_prompt_shows_the_text_and_names_the_marks_that_are_read() -> None:
    prompt = builtin_prompt("thoughts")
    assert (prompt.kind, prompt.slots) == ("text", {"text", "code"})
    assert read_thoughts([f"{TEXT}[[thought]]a[[/thought]]"], TEXT)[1] == ""
    assert "[[thought]]" in "".join(prompt.body)
    assert "[[/thought]]" in "".join(prompt.body)
