"""Documents with thoughts: chunks that join to the text, two halves without a common document, records of both."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from fake_judge import FakeJudge
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_cases import files_below, run
from tiny_tokenizer import MULTILINGUAL, byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.judge.settings import ClientSettings, Endpoint
from megatron_sip.judge.thought_writer import ThoughtSettings, ThoughtWriter
from megatron_sip.prepare.documents import Document
from megatron_sip.prepare.pipeline import Made
from megatron_sip.prepare.settings import PrepareError
from megatron_sip.prepare.thoughts import HALVES, Chunker, Half, ThinkingSettings, ThoughtMaker, half_of

TOKENIZERS = {"byte-level": byte_level_tokenizer(), "metaspace": metaspace_tokenizer()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    saved = {}
    for name, tokenizer in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folder)
        saved[name] = str(folder)
    return saved


texts = st.lists(st.sampled_from([*MULTILINGUAL, " ", "\n\n", ". ", "x" * 40, "a b"]), min_size=1, max_size=12).map(
    "".join
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40)
@given(text=texts, length=st.integers(8, 40))
def test_chunks_join_to_the_text_and_are_no_longer_than_asked_for(
    folders: dict[str, str], name: str, text: str, length: int
) -> None:
    chunker = Chunker(ThinkingSettings(folders[name], seq_length=length, min_length=1, suffix_length=5))
    chunks = chunker.chunks(text)
    assert "".join(chunks) == text
    assert all(chunks)
    assert max(map(chunker.tokens, chunks)) <= length
    assert chunker.tokens(text) > length or len(chunks) == 1
    beginning = chunker.beginning(text)
    assert text.startswith(beginning)
    assert beginning == text or beginning.strip() or not text[:5].strip()


def test_a_chunk_ends_at_the_best_break_in_its_second_half(folders: dict[str, str]) -> None:
    chunker = Chunker(ThinkingSettings(folders["byte-level"], seq_length=60, min_length=1))
    paragraph = "The quick brown fox. It jumps over the lazy dog again and again"
    text = f"{paragraph}.\n\n{paragraph} and again and again"
    assert chunker.chunks(text)[0].endswith(("again.", "fox.", "dog"))
    assert all(chunk[:1].isspace() for chunk in chunker.chunks(text)[1:])


def make_documents(count: int) -> list[Document]:
    return [
        Document(
            f"Document {i} says so. It has a sum: {i} + 1.\n\nThe sum is {i + 1}.", 7919 * i, (0, i), "train", "sums"
        )
        for i in range(count)
    ]


def insert_thoughts(prompt: str) -> str:
    """A teacher that thinks before "The sum", and forgets a word of document 3."""
    found = re.search(r"\[begin text \w+\]\n(.*)\n\[end text", prompt, re.DOTALL)
    assert found is not None
    text = found[1].replace("Document 3 says so", "Document 3 says")
    return text.replace("\n\nThe sum", " [[thought]]I have to add one.[[/thought]]\n\nThe sum")


async def make(folder: str, half: Half, documents: list[Document], **changes: int) -> list[Made]:
    settings = ThinkingSettings(folder, **{"seq_length": 200, "min_length": 4, "suffix_length": 6} | changes)
    async with FakeJudge(answer=insert_thoughts) as server:
        client = ClientSettings((Endpoint(server.url, "openai"),))
        async with ThoughtWriter(ThoughtSettings(client)) as writer:
            await writer.check(5.0)
            return list(await ThoughtMaker(Chunker(settings), settings, writer, half)(documents))


async def test_one_half_is_written_with_thoughts_and_of_the_other_the_places(folders: dict[str, str]) -> None:
    documents = make_documents(12)
    halves = {half: await make(folders["byte-level"], half, documents) for half in HALVES}
    for number, document in enumerate(documents):
        mine = half_of(document.key)
        other = halves[HALVES[mine == "sft"]][number]
        assert (other.records, +other.dropped) == ([], Counter({"of-the-other-half": 1}))
        made = halves[mine][number]
        if number == 3:
            assert (made.records, +made.dropped) == ([], Counter({"text-changed": 1}))
            continue
        assert not +made.dropped
        [record] = made.records
        assert (record["subset"], record["split"]) == ("sums", "train")
        prefix, rest = document.text.split("\n\n")
        if mine == "sft":
            assert record["text"] == f"{prefix}<think>I have to add one.</think>\n\n{rest}"
        else:
            assert record["prefix"] == prefix
            assert f"\n\n{rest}".startswith(record["suffix"])
            assert len(TOKENIZERS["byte-level"].encode(record["suffix"])) == 6
            assert (record["start_mark"], record["end_mark"]) == ("<think>", "</think>")
            assert "I have to add one" not in "".join(record.values())  # the teacher gives the place alone
    assert {half_of(document.key) for document in documents} == set(HALVES)


async def test_short_chunks_and_texts_with_the_marks_are_counted(folders: dict[str, str]) -> None:
    documents = [
        Document("short", 0, (0, 0), "train", "x"),
        Document("It says </think> by itself. " * 3, 0, (0, 1), "train", "x"),
    ]
    short, marked = await make(folders["byte-level"], half_of(0), documents, min_length=30)
    assert (short.records, +short.dropped) == ([], Counter({"too-short": 1}))
    assert (marked.records, +marked.dropped) == ([], Counter({"marks-in-text": 1}))


async def test_the_command_writes_both_halves_and_goes_on_without_asking_again(
    folders: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in make_documents(40)))
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return insert_thoughts(prompt)

    async with FakeJudge(answer=answer) as server:
        words = (
            *("thoughts", "--data-path", data, "--tokenizer", folders["byte-level"], "--min-length", "4"),
            *("--teacher-url", server.url, "--teacher-api", "openai", "--teacher-name", "fake"),
            *("--role-shares", "1", "--split", "1", "--out", tmp_path / "out"),
        )
        manifest = await asyncio.to_thread(run, *words)
        files = files_below(tmp_path / "out")
        before = len(asked)
        assert await asyncio.to_thread(run, *words) == manifest
        shutil.rmtree(tmp_path / "out" / "rl")  # as if it had been killed before
        assert await asyncio.to_thread(run, *words) == manifest
    assert await asyncio.to_thread(run, *words) == manifest  # finished work needs no server
    assert before == len(asked) == 40
    assert files_below(tmp_path / "out") == files
    documents, places = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("sft/train.jsonl", "rl/thoughts.jsonl")
    )
    assert len(documents) + len(places) == 39
    assert manifest["records"]["sft"]["total"] == len(documents) > 9
    assert manifest["records"]["rl"]["total"] == len(places) > 9
    assert sum(dropped.get("text-changed", 0) for dropped in manifest["dropped"].values()) == 1
    plain = {record["text"].replace("<think>I have to add one.</think>", "") for record in documents}
    assert plain <= {document.text for document in make_documents(40)}
    assert plain.isdisjoint(record["prefix"] + record["suffix"] for record in places)
    assert {record["subset"] for record in (*documents, *places)} == {"sums"}


def test_the_halves_are_halves() -> None:
    assert 450 < sum(half_of(key) == "sft" for key in range(1000)) < 550


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_length": 3000}, "--min-length 3000 must be 1 to --seq-length 2048"),
        ({"suffix_length": 0}, "--suffix-length 0 at least 1"),
        ({"end_mark": "<think>"}, "two different texts"),
        ({"start_mark": ""}, "two different texts"),
        ({"end_mark": "k>"}, "neither within the other"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(PrepareError, match=re.escape(message)):
        ThinkingSettings("folder", **changes)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=re.escape(f"--tokenizer {tmp_path}")):
        Chunker(ThinkingSettings(str(tmp_path)))
