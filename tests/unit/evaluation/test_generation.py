"""Generations survive a kill at any byte, belong to what made them, and are never short of one without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import metaspace_tokenizer

from megatron_sip.data.continuation_text import rollout_texts
from megatron_sip.errors import DataError
from megatron_sip.evaluation.generation import GenerationError, Generations, Repeated, generate, read_generations
from megatron_sip.records import Task
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings

SAMPLING = SamplingSettings(max_new_tokens=2)
TOKENIZER = metaspace_tokenizer()


class Tasks:
    """Task i continues the tokens [5, 6 + i]; two tasks a document."""

    def tasks(self, start: int, count: int) -> list[Task]:
        return [
            Task(i, [5, 6 + i], [7, 8], TOKENIZER.decode([5, 6 + i]), TOKENIZER.decode([7, 8]))
            for i in range(start, start + count)
        ]

    def document(self, index: int) -> tuple[int, int]:
        return 0, index // 2


class Engines:
    """Answers with a function of the prefix; prefix number `fails_at`, counted over all calls, fails once."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self._fails_at = fails_at

    async def generate(self, prefixes: Sequence[Sequence[int]], settings: SamplingSettings) -> list[Any]:
        answers: list[Any] = []
        for prefix in prefixes:
            fails = len(self.asked) == self._fails_at
            self.asked.append(list(prefix))
            made = Completion([prefix[1] + 1, 9], [-1.0, -2.0], "length", "default")
            answers.append(Failure("connection", "it is gone") if fails else [made])
        return answers


def make(path: Path, samples: int, engines: Engines | None = None, *, model: str = "m", batch: int = 3) -> Generations:
    work = generate(
        path,
        {"model": model},
        engines or Engines(),  # type: ignore[arg-type]
        Tasks(),
        TOKENIZER,
        SAMPLING,
        samples,
        batch=batch,
    )
    return asyncio.run(work)


def test_lines_are_the_tasks_with_their_continuations(tmp_path: Path) -> None:
    made = make(tmp_path / "g.jsonl", 4)
    tasks = Tasks().tasks(0, 4)
    texts = [rollout_texts(TOKENIZER, task, [[task.prefix_ids[1] + 1, 9]])[0] for task in tasks]
    assert [(line.index, line.document) for line in made.lines] == [(0, "0:0"), (1, "0:0"), (2, "0:1"), (3, "0:1")]
    assert [line.text for line in made.lines] == texts
    assert [(line.prefix, line.suffix) for line in made.lines] == [(t.prefix_text, t.suffix_text) for t in tasks]
    assert made.lines[0].candidate.truncated


def test_repeated_tasks_have_numbers_of_their_own_and_their_documents() -> None:
    tasks, once = Repeated(Tasks(), 3), Tasks().tasks(0, 3)
    found = tasks.tasks(1, 6)
    assert [task.index for task in found] == [1, 2, 3, 4, 5, 6]
    assert [task.prefix_ids for task in found] == [once[i].prefix_ids for i in (1, 2, 0, 1, 2, 0)]
    assert [tasks.document(i) for i in range(6)] == [Tasks().document(i % 3) for i in range(6)]


@given(st.data())
def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    make(folder / "whole.jsonl", 5)
    whole = (folder / "whole.jsonl").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    (folder / "cut.jsonl").write_bytes(whole[:cut])
    engines = Engines()
    make(folder / "cut.jsonl", 5, engines)
    assert (folder / "cut.jsonl").read_bytes() == whole
    assert len(engines.asked) == 5 - max(0, whole[:cut].count(b"\n") - 1)  # none is asked for again


def test_a_failure_ends_it_and_keeps_what_was_made(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    with pytest.raises(GenerationError, match=r"1 of 3 prefixes .*connection 1.*it is gone"):
        make(path, 6, Engines(fails_at=4))
    assert [line.index for line in read_generations(path).lines] == [0, 1, 2]
    assert [line.index for line in make(path, 6).lines] == list(range(6))


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "g.jsonl", 2)
    with pytest.raises(DataError, match="model 'm', not 'other'"):
        make(tmp_path / "g.jsonl", 2, model="other")


@pytest.mark.parametrize("content", ['{"text": "a document"}\n', '{"text": "a document"}', "a text\nand no end"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, content: str) -> None:
    (tmp_path / "g.jsonl").write_text(content)
    with pytest.raises(DataError, match="is not a file of generations"):
        make(tmp_path / "g.jsonl", 2)
    assert (tmp_path / "g.jsonl").read_text() == content
