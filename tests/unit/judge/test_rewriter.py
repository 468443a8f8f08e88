"""The rewriter's contract: start words, copies, refusals, counts."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.judge import ClientSettings, Endpoint, Rewriter, RewriterSettings, SettingsError
from megatron_sip.judge.refusals import is_refusal
from megatron_sip.judge.rewriter import START_BYTES, START_CHARS, fit_whitespace, last_words, without_start
from megatron_sip.records import Candidate, Task

TOKENIZER = byte_level_tokenizer()
METASPACE = metaspace_tokenizer()
PREFIX = "The committee met on Tuesday and decided that the old bridge"
REFUSALS = json.loads((Path(__file__).parents[2] / "data" / "refusals.json").read_text(encoding="utf-8"))
HOSTILE = json.loads((Path(__file__).parents[2] / "data" / "hostile_texts.json").read_text(encoding="utf-8"))


def make_task(index: int, suffix: str, prefix: str = PREFIX) -> Task:
    return Task(index, TOKENIZER.encode(prefix), TOKENIZER.encode(suffix), prefix, suffix)


def make_settings(url: str, **changes: object) -> RewriterSettings:
    client = ClientSettings((Endpoint(url, "openai"),), call_timeout_s=30.0, attempts=2)
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


@pytest.mark.parametrize("text", REFUSALS["refusals"])
def test_refusals(text: str) -> None:
    assert is_refusal(text)
    assert is_refusal(text.replace("'", "’").replace("I ", "I\n  "))
    assert is_refusal(f"\n\n{text}")


@pytest.mark.parametrize("text", REFUSALS["others"])
def test_what_only_sounds_like_a_refusal(text: str) -> None:
    assert not is_refusal(text)
    assert not is_refusal(text.replace("'", "’"))


def test_only_the_opening_tells_a_refusal() -> None:
    assert min(len(set(texts)) for texts in REFUSALS.values()) >= 30
    assert not is_refusal("The clerk read the letter aloud. I'm sorry, but I can't help with that request, it said.")
    assert is_refusal("I'm sorry, but I can't help with that request. The clerk read the letter aloud.")


async def test_a_refusal_instead_of_the_start_words_is_one() -> None:
    made, counters = await rewrite("I apologize, but I cannot rewrite this passage.", [make_task(0, " falls down.")])
    assert made == [None]
    assert counters["dropped/refused"] == 1


@pytest.mark.parametrize("finish", ["abort", "content_filter"])
async def test_an_aborted_answer_is_no_rewrite(finish: str, tmp_path: Path) -> None:
    """Nor is it kept: it says nothing about the suffix."""
    task, ends = make_task(0, " falls down."), [finish, "stop"]

    def ended(body: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
        reply["choices"][0]["finish_reason"] = ends.pop(0)
        return reply

    async with FakeJudge(answer=lambda prompt: "decided that the old bridge stays.", edits=ended) as server:
        settings = RewriterSettings(ClientSettings((Endpoint(server.url, "openai"),), cache_path=tmp_path / "a.sqlite"))
        async with Rewriter(settings, TOKENIZER, 40) as rewriter:
            assert await rewriter.rewrite([task]) == [None]
            assert rewriter.counters()["dropped/failed"] == rewriter.counters()["unreadable/aborted"] == 1
            [made] = await rewriter.rewrite([task])
            assert made is not None
            assert made.text == " stays."


OWN_PROMPT = """+++
name = "careful"
kind = "text"
+++
Rewrite X step by step, with the reasons that a patient teacher would give.

C:
{{prefix}}

X:
{{continuation}}

Begin with: {{first_words}}
"""


async def test_the_instructions_may_be_those_of_a_file_and_its_rewrites_are_kept_apart(tmp_path: Path) -> None:
    task, asked = make_task(0, " falls down."), []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return f"decided that the old bridge stays, {len(asked)}."

    path = tmp_path / "careful.txt"
    path.write_text(OWN_PROMPT)
    async with FakeJudge(answer=answer) as server:
        client = ClientSettings((Endpoint(server.url, "openai"),), cache_path=tmp_path / "answers.sqlite")
        made = []
        for wording in (None, OWN_PROMPT, OWN_PROMPT, OWN_PROMPT.replace("patient", "strict"), None):
            if wording is not None:
                path.write_text(wording)
            settings = RewriterSettings(client, prompt_file=None if wording is None else path)
            async with Rewriter(settings, TOKENIZER, 400) as rewriter:
                [candidate] = await rewriter.rewrite([task])
                assert candidate is not None
                made.append(candidate.text)
    assert made == [f" stays, {number}." for number in (1, 2, 2, 3, 1)]
    assert ["step by step" in prompt for prompt in asked] == [False, True, True]
    assert "a strict teacher" in asked[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no header", "a prompt file starts with a TOML header"),
        (OWN_PROMPT.replace("{{continuation}}", ""), "it must contain {{continuation}}"),
        (OWN_PROMPT.replace("{{first_words}}", ""), "it must contain {{first_words}}"),
        (OWN_PROMPT.replace("{{prefix}}", "{{reference}}"), "a rewriter knows no {{reference}}"),
        (OWN_PROMPT.replace('"text"', "\"text\"\npattern = 'NEW: (.*)'"), "its whole answer is the rewrite"),
        (OWN_PROMPT.replace('"text"', '"text"\nstart = "NEW: "'), "its whole answer is the rewrite"),
        (
            OWN_PROMPT.replace('"text"', "\"pointwise\"\npattern = '(A|B)'\n[values]\nA = 1\nB = 0") + "{{candidate}}",
            "a rewriter's prompt has kind = 'text'",
        ),
    ],
)
def test_a_file_that_is_no_rewriter_s_prompt_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "careful.txt"
    path.write_text(content)
    with pytest.raises(SettingsError, match=re.escape(message)) as caught:
        RewriterSettings(ClientSettings((Endpoint("http://h"),)), prompt_file=path)
    assert str(caught.value).startswith("--rewrite-prompt")
    assert str(path) in str(caught.value)


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
    assert bool(words) == bool(prefix.strip())
    assert len(words.strip()) <= START_CHARS
    assert len(words.strip().encode(errors="replace")) <= START_BYTES
    five = prefix.split()[-5:]
    if len(prefix) <= START_CHARS and len(prefix.encode(errors="replace")) <= START_BYTES:
        assert words.split() == five
    elif all(len(word.encode(errors="replace")) <= START_BYTES and len(word) <= START_CHARS for word in five):
        assert words.split() == five[len(five) - len(words.split()) :]  # whole words, where the last one fits


CHINESE = "委员会星期二开会，" * 40 + "决定那座旧桥必须在春天之前修好，否则"
JAPANESE = "委員会は火曜日に集まり、" * 40 + "古い橋は春までに直さなければならないと"
THAI = "คณะกรรมการประชุมกันในวันอังคารและตัดสินใจว่าสะพานเก่าจะต้องซ่อมให้เสร็จก่อนฤดูใบไม้ผลิ" * 10
MINIFIED = (
    "!function(e,t){for(var n=0;n<t.length;n++)e.push(t[n]);return e}(window,document.forms);" * 20
    + "var q=function(r){return"
)
EMOJI = "👩‍👩‍👧🚀½" * 100


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (CHINESE, "决定那座旧桥必须在春天之前修好，否则"),
        (JAPANESE, "古い橋は春までに直さなければならないと"),
        (MINIFIED, "e}(window,document.forms);var q=function(r){return"),
        ("let a=1;" + "for(i=0;i<9;)a+=i++;" * 90, "for(i=0;i<9;)a+=i++;"),
        ("A " + "x" * 500, "x" * 24),
        ("one two three four five six ", "two three four five six "),
        ("one two \n\n three", "one two \n\n three"),
        ("a " + "long" * 12 + " words here", "long" * 12 + " words here"),
        ("a " + "long" * 16 + " words here", "words here"),
        ("end" + "\n" * 5000, "end" + "\n" * 60),
    ],
)
def test_last_words_without_spaces_are_bounded(prefix: str, words: str) -> None:
    assert last_words(prefix) == words


@pytest.mark.parametrize("tokenizer", [TOKENIZER, METASPACE], ids=["byte-level", "metaspace"])
@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        (CHINESE, "要拆掉。"),
        (JAPANESE, "決めた。"),
        (THAI, "แล้วเสร็จ"),
        (THAI[:-1], "ิแล้ว"),
        (MINIFIED, " r+1};"),
        (MINIFIED[:-3], "urn r};"),
        (EMOJI, "🙂 end"),
    ],
    ids=["chinese", "japanese", "thai", "thai-in-syllable", "minified", "minified-in-word", "emoji"],
)
async def test_the_seam_is_exact_where_words_have_no_spaces(tokenizer: Any, prefix: str, text: str) -> None:
    prefix_ids = tokenizer.encode(prefix, add_special_tokens=False)
    task = Task(0, prefix_ids, tokenizer.encode("x", add_special_tokens=False), prefix, "x")
    start = last_words(prefix)
    assert len(tokenizer.encode(start, add_special_tokens=False)) <= START_BYTES + 1  # one may stand for the beginning
    assert not unicodedata.category(start[0]).startswith("M")
    [made], counters = await rewrite(start + text, [task], tokenizer=tokenizer)
    assert made is not None, counters
    assert made.text == text
    assert tokenizer.decode(prefix_ids + made.ids) == prefix + text


def test_start_words_match_whatever_the_white_space() -> None:
    assert without_start('"the  old\nBridge is', "the old bridge ", required=True) == " is"
    assert without_start("another start", "the old bridge", required=True) is None
    assert without_start("another start", "the old bridge", required=False) == "another start"
    assert without_start("anything", "", required=True) == "anything"
    assert without_start("These are", "The", required=False) == "These are"
    assert without_start("the old bridge is", "the old bridge", required=False) == " is"
    assert without_start("那座旧桥必须在春天之前修好要拆掉", "那座旧桥必须在春天之前修好", required=False) == "要拆掉"
    assert without_start("the old bridges", "the old bridge", required=True) == "s"  # the prefix may end within a word


def test_white_space_at_the_seam_is_not_doubled() -> None:
    assert fit_whitespace(" is old. \n", "the bridge") == " is old."
    assert fit_whitespace(" is old.", "the bridge ") == "is old."
    assert fit_whitespace("ge is old.", "the brid") == "ge is old."
