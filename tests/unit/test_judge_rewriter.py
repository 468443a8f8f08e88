"""The rewriter's contract: start words, copies, refusals, counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.judge import ClientSettings, Endpoint, Rewriter, RewriterSettings, SettingsError
from megatron_sip.judge.rewriter import fit_whitespace, last_words, without_start
from megatron_sip.samples import Candidate, Task

TOKENIZER = byte_level_tokenizer()
METASPACE = metaspace_tokenizer()
PREFIX = "The committee met on Tuesday and decided that the old bridge"
HOSTILE = json.loads((Path(__file__).parents[1] / "data" / "hostile_texts.json").read_text(encoding="utf-8"))


def make_task(index: int, suffix: str, prefix: str = PREFIX) -> Task:
    return Task(index, TOKENIZER.encode(prefix), TOKENIZER.encode(suffix), prefix, suffix)


def make_settings(url: str, **changes: object) -> RewriterSettings:
    client = ClientSettings((Endpoint(url, "openai"),), call_timeout_s=0.3, attempts=2)
    return RewriterSettings(client, deadline_s=5.0, **changes)  # type: ignore[arg-type]


async def rewrite(
    answer: str, tasks: list[Task], max_tokens: int = 400, tokenizer: Any = TOKENIZER
) -> tuple[list[Candidate | None], dict[str, float]]:
    async with (
        FakeJudge(answer=lambda prompt: answer) as server,
        Rewriter(make_settings(server.url), tokenizer, max_tokens) as rewriter,
    ):
        await rewriter.check(5.0)
        return await rewriter.rewrite(tasks), rewriter.counters()


async def test_the_start_words_are_cut_off() -> None:
    [made], counters = await rewrite("decided that the old bridge would be repaired.", [make_task(0, " falls down.")])
    assert made == Candidate("rewrite", TOKENIZER.encode(" would be repaired."), " would be repaired.")
    assert counters["rewrites"] == 1


async def test_the_rewrite_is_cut_to_the_suffix_length() -> None:
    [made], _ = await rewrite("decided that the old bridge would be repaired and painted.", [make_task(0, " x")], 6)
    assert made is not None
    assert len(made.ids) == 6
    assert " would be repaired and painted.".startswith(made.text)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, METASPACE], ids=["byte-level", "metaspace"])
@pytest.mark.parametrize(
    ("prefix", "text"), [("The quick", " red fox"), ("The quick ", "red fox"), ("The qui", "et fox")]
)
async def test_a_rewrite_s_ids_continue_the_prefix_s(tokenizer: Any, prefix: str, text: str) -> None:
    prefix_ids = tokenizer.encode(prefix, add_special_tokens=False)
    task = Task(0, prefix_ids, tokenizer.encode("x", add_special_tokens=False), prefix, " x")
    [made], _ = await rewrite(prefix + text, [task], tokenizer=tokenizer)
    assert made is not None
    assert made.text == text
    assert tokenizer.decode(prefix_ids + made.ids) == prefix + text


async def test_special_tokens_that_the_teacher_writes_out_are_text() -> None:
    [made], _ = await rewrite("decided that the old bridge<|eos|> stays.", [make_task(0, " falls down.")])
    assert made is not None
    assert TOKENIZER.eos_token_id not in made.ids
    assert made.text == TOKENIZER.decode(made.ids) == "<|eos|> stays."


async def test_a_rewrite_that_cannot_finish_the_prefix_s_character_is_counted() -> None:
    ids = TOKENIZER.encode("x色は")
    assert TOKENIZER.decode(ids[:2]) == "x\ufffd"
    made, counters = await rewrite("x other", [Task(0, ids[:2], ids[2:], "x", "色は")])
    assert made == [None]
    assert counters["dropped/seam-in-character"] == 1


async def test_a_copy_is_the_suffix_itself() -> None:
    task = make_task(0, " falls down.")
    [made], counters = await rewrite("decided that the old bridge falls down.", [task])
    assert made == Candidate("rewrite", task.suffix_ids, task.suffix_text)
    assert counters["copies"] == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Here is a better version of it.", "wrong-start"),
        ("decided that the old bridge", "empty"),
        ("decided that the old bridge  \n ", "empty"),
        ("decided that the old bridge. I'm sorry, but I can't help with that request.", "refused"),
        ("decided that the old bridge I cannot continue this text, as it is harmful content.", "refused"),
        ("<think>decided that the old bridge stays</think>", "wrong-start"),
    ],
)
async def test_what_is_no_rewrite_is_dropped_and_counted(answer: str, reason: str) -> None:
    made, counters = await rewrite(answer, [make_task(0, " falls down.")])
    assert made == [None]
    assert counters[f"dropped/{reason}"] == 1


async def test_a_suffix_that_sounds_like_a_refusal_may_be_copied() -> None:
    task = make_task(0, " I cannot help but write this down.")
    [made], _ = await rewrite("decided that the old bridge I cannot help but write this down.", [task])
    assert made is not None
    assert made.text == task.suffix_text


async def test_failures_leave_the_task_without_rewrite() -> None:
    async with (
        FakeJudge(lambda index: "status") as server,
        Rewriter(make_settings(server.url), TOKENIZER, 8) as rewriter,
    ):
        assert await rewriter.rewrite([make_task(0, " a"), make_task(1, " b")]) == [None, None]
        assert rewriter.counters()["dropped/failed"] == 2


async def test_rewrites_of_another_run_are_not_asked_again(tmp_path: Path) -> None:
    tasks = [make_task(i, f" falls down {i} times.") for i in range(4)]
    async with FakeJudge(answer=lambda prompt: "decided that the old bridge stays.") as server:
        client = ClientSettings((Endpoint(server.url, "openai"),), cache_path=tmp_path / "rewrites.sqlite")
        made = []
        for _ in range(2):
            async with Rewriter(RewriterSettings(client), TOKENIZER, 40) as rewriter:
                made.append(await rewriter.rewrite(tasks))
        assert made[0] == made[1]
        assert server.requests == 4


@pytest.mark.parametrize("hostile", HOSTILE)
async def test_hostile_texts_stay_inside_their_fences(hostile: str) -> None:
    async with FakeJudge(answer=lambda prompt: "no start here") as server:
        async with Rewriter(make_settings(server.url), TOKENIZER, 8) as rewriter:
            await rewriter.rewrite([make_task(0, hostile, f"{PREFIX} {hostile}")])
        [prompt] = server.prompts
        code = re.search(r"the code ([0-9a-f]{8})", prompt)
        assert code is not None
        assert prompt.count(f"[begin prefix {code[1]}]") == prompt.count(f"[end continuation {code[1]}]") == 1
        assert "<|" not in prompt


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(SettingsError, match="temperature -1"):
        make_settings("http://a", temperature=-1.0)


@given(st.text())
def test_last_words_are_the_end_of_the_prefix(prefix: str) -> None:
    words = last_words(prefix)
    assert prefix.endswith(words)
    assert words.split() == prefix.split()[-5:]


def test_start_words_match_whatever_the_white_space() -> None:
    assert without_start('"the  old\nBridge is', "the old bridge ", required=True) == " is"
    assert without_start("another start", "the old bridge", required=True) is None
    assert without_start("another start", "the old bridge", required=False) == "another start"
    assert without_start("anything", "", required=True) == "anything"
    assert without_start("These are", "The", required=False) == "These are"
    assert without_start("the old bridge is", "the old bridge", required=False) == " is"
    assert without_start("the old bridges", "the old bridge", required=True) == "s"  # the prefix may end within a word


def test_white_space_at_the_seam_is_not_doubled() -> None:
    assert fit_whitespace(" is old. \n", "the bridge") == " is old."
    assert fit_whitespace(" is old.", "the bridge ") == "is old."
    assert fit_whitespace("ge is old.", "the brid") == "ge is old."
