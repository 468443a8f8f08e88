"""The comparison with the initial policy, and its control: that policy at a lower temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_tokenizer import metaspace_tokenizer

from megatron_sip.errors import DataError
from megatron_sip.evaluation.held_out import HeldOutComparison, HeldOutOutcome, save_continuations
from megatron_sip.evaluation.outcome import held_out_summary, outcome_line
from megatron_sip.evaluation.report import result_rows
from megatron_sip.metrics import Mean
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings

TOKENIZER = metaspace_tokenizer()


class ShorterIsBetter:
    """A judge without a server."""

    weights: ClassVar = {"likelihood": 1.0}

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        scores = [[-float(len(c.text)) for c in group.candidates] for group in groups]
        return [
            replace(group, scores=own, criterion_scores={"likelihood": own})
            for group, own in zip(groups, scores, strict=True)
        ]

    def counters(self) -> dict[str, float]:
        return {}

    def means(self) -> dict[str, Mean]:
        return {}


class Engines:
    """A policy whose continuations are as long as they were asked hot, and shorter once trained."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []

    async def generate(self, prefixes: Sequence[Any], sampling: SamplingSettings, *, weight_version: str) -> list[Any]:
        self.asked.append((weight_version, sampling.temperature))
        words = "The quick brown fox" if sampling.temperature == 1.0 else "The quick brown"
        ids = TOKENIZER.encode("The quick" if weight_version != "0" else words, add_special_tokens=False)
        return [[Completion(ids, [-1.0] * len(ids), "length", weight_version)] for _ in prefixes]

    async def logprobs(
        self, prefixes: Sequence[Any], continuations: Sequence[Sequence[int]], *, weight_version: str
    ) -> list[Any]:
        lost = Failure("timeout", "no answer")
        return [lost, *([-1.0 - float(weight_version)] * len(ids) for ids in continuations[1:])]


def comparison(folder: Path, temperature: float) -> HeldOutComparison:
    tasks = [Task(index, [1], [2], "text", "") for index in range(30)]
    sampling = SamplingSettings(8, temperature)
    return HeldOutComparison(tasks, range(30), sampling, TOKENIZER, folder / "initial_continuations.json", 0)


async def compared(folder: Path, temperature: float) -> tuple[HeldOutOutcome, list[tuple[str, float]]]:
    engines, held_out = Engines(), comparison(folder, temperature)
    await held_out.record_initial(engines)  # type: ignore[arg-type]
    found = await held_out.finish(engines, ShorterIsBetter(), "7")  # type: ignore[arg-type]
    return found, engines.asked


async def test_sampled_continuations_have_a_control_at_a_lower_temperature(tmp_path: Path) -> None:
    found, asked = await compared(tmp_path, 1.0)
    assert asked == [("0", 0.7), ("0", 1.0), ("7", 1.0)]
    assert found.win_rate.win_rate == 1.0
    assert found.control is not None
    assert (found.control.temperature, found.control.win_rate.win_rate) == (0.7, 1.0)
    assert found.suffix_nll == (1.0, 8.0)
    assert found.distinct_3 == (2 / 60, 0.0)  # 30 times the same four words; two have no 3-gram


async def test_greedy_ones_need_none(tmp_path: Path) -> None:
    found, asked = await compared(tmp_path, 0.0)
    assert asked == [("0", 0.0), ("7", 0.0)]
    assert found.control is None
    assert held_out_summary(found)["control"] is None


async def test_the_control_stands_beside_the_win_rate(tmp_path: Path) -> None:
    summary = {"steps": 7, **held_out_summary((await compared(tmp_path, 1.0))[0])}
    assert "100.0% for the initial policy at a lower temperature" in outcome_line(tmp_path, summary)
    rows = dict(result_rows([], summary))
    assert rows["Control: the initial policy at temperature 0.7 over itself"].startswith("100.0%")
    assert rows["Distinct 3-grams, initial and trained policy"] == "3.3% and 0.0%"
    assert rows["Held-out suffixes, nats a token, initial and trained policy"] == "1.000 and 8.000"


async def test_a_run_that_began_without_a_control_ends_without(tmp_path: Path) -> None:
    engines, held_out = Engines(), comparison(tmp_path, 1.0)
    await held_out.record_initial(engines)  # type: ignore[arg-type]
    (tmp_path / "control_continuations.json").unlink()
    assert (await held_out.finish(engines, ShorterIsBetter(), "7")).control is None  # type: ignore[arg-type]


def test_a_comparison_that_cannot_end_is_refused_before_training(tmp_path: Path) -> None:
    initial = tmp_path / "initial_continuations.json"
    tasks = [Task(0, [1], [2], "text", "")]
    comparison = HeldOutComparison(tasks, [0], SamplingSettings(8), None, initial, 0)
    with pytest.raises(DataError, match="--win-rate-prompts 0"):
        comparison.check_initial()
    save_continuations(initial, [Candidate("rollout", [1], "a"), None])
    with pytest.raises(DataError, match="--win-rate-prompts 2"):
        comparison.check_initial()
    save_continuations(initial, [None])
    comparison.check_initial()
