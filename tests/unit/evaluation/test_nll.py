"""Log-likelihoods add up over tokens, survive a kill at any byte, and are never short of a task without a word."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.errors import DataError
from megatron_sip.evaluation.nll import Measured, MeasuringError, measure, nll_result
from megatron_sip.evaluation.win_rate import bootstrap_interval
from megatron_sip.records import Task
from megatron_sip.rollout.sampling import Failure


class Tasks:
    """Task i has i + 1 tokens; three tasks a document."""

    def tasks(self, start: int, count: int) -> list[Task]:
        return [Task(i, [1, 2], list(range(3, 4 + i)), "", "") for i in range(start, start + count)]

    def document(self, index: int) -> tuple[int, int]:
        return 0, index // 3


class Engines:
    """Token t has -t / 7 nats; the task with `fails` tokens has none."""

    def __init__(self, fails: int | None = None) -> None:
        self.asked = 0
        self._fails = fails

    async def logprobs(self, prefixes: Any, continuations: Sequence[Sequence[int]]) -> list[Any]:
        self.asked += len(continuations)
        return [
            Failure("timeout", "it hangs") if len(ids) == self._fails else [-token / 7 for token in ids]
            for ids in continuations
        ]


def make(path: Path, samples: int, engines: Engines | None = None, model: str = "m") -> list[Measured]:
    return asyncio.run(measure(path, {"model": model}, engines or Engines(), Tasks(), samples, batch=2))  # type: ignore[arg-type]


def test_the_mean_is_over_tokens_not_over_tasks(tmp_path: Path) -> None:
    lines = make(tmp_path / "n.jsonl", 5)
    assert [(line.index, line.document, line.tokens) for line in lines] == [(i, f"0:{i // 3}", i + 1) for i in range(5)]
    tokens = [token for i in range(5) for token in range(3, 4 + i)]
    result = nll_result(lines, "suffix", seed=0)
    assert result.value == pytest.approx(math.fsum(tokens) / 7 / len(tokens), rel=1e-12)
    assert (result.measure, result.dataset, result.samples, result.failed) == ("nll", "suffix", 5, 0)
    assert result.interval is not None
    assert result.interval[0] <= result.value <= result.interval[1]
    assert nll_result(lines[:3], "suffix", seed=0).interval is None  # one document says nothing of others


@given(st.integers(0, 10_000))
def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, place: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    make(folder / "whole.jsonl", 5)
    whole = (folder / "whole.jsonl").read_bytes()
    cut = place % (len(whole) + 1)
    (folder / "cut.jsonl").write_bytes(whole[:cut])
    engines = Engines()
    make(folder / "cut.jsonl", 5, engines)
    assert (folder / "cut.jsonl").read_bytes() == whole
    assert engines.asked == 5 - max(0, whole[:cut].count(b"\n") - 1)  # none is asked for again


def test_a_failure_ends_it_and_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    with pytest.raises(MeasuringError, match=r"1 of 2 tasks .*timeout.*it hangs"):
        make(path, 5, Engines(fails=4))
    engines = Engines()
    assert len(make(path, 5, engines)) == 5
    assert engines.asked == 3
    assert len(make(path, 4)) == 4  # fewer are the first of them
    with pytest.raises(DataError, match="model 'm', not 'other'"):
        make(path, 5, model="other")
    (tmp_path / "text.jsonl").write_text('{"text": "a document"}\n')
    with pytest.raises(DataError, match="is not a file of negative"):
        make(tmp_path / "text.jsonl", 5)


def test_an_interval_of_a_weighted_mean_is_that_of_as_many_equal_outcomes() -> None:
    outcomes, weights = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1, 3, 2, 5])
    repeated = np.repeat(outcomes, weights)
    documents = np.repeat(np.arange(4), weights).tolist()
    expected = bootstrap_interval(repeated, documents, seed=3)
    assert bootstrap_interval(outcomes, range(4), 3, weights) == pytest.approx(expected)
