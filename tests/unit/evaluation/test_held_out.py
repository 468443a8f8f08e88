"""The comparison with the initial policy, and its control: that policy at a lower temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_tokenizer import metaspace_tokenizer

from megatron_sip.errors import DataError
from megatron_sip.evaluation.held_out import HeldOutComparison, HeldOutOutcome
from megatron_sip.evaluation.initial_policy import InitialPolicy, InitialPolicyFile
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

    def __init__(self, lost: int = 0) -> None:
        self.asked: list[tuple[str, float]] = []
        self._lost = lost

    async def generate(self, prefixes: Sequence[Any], sampling: SamplingSettings, *, weight_version: str) -> list[Any]:
        self.asked.append((weight_version, sampling.temperature))
        words = "The quick brown fox" if sampling.temperature == 1.0 else "The quick brown"
        ids = TOKENIZER.encode("The quick" if weight_version != "0" else words, add_special_tokens=False)
        return [[Completion(ids, [-1.0] * len(ids), "length", weight_version)] for _ in prefixes]

    async def logprobs(
        self, prefixes: Sequence[Any], continuations: Sequence[Sequence[int]], *, weight_version: str
    ) -> list[Any]:
        found: list[Any] = [[-1.0 - float(weight_version)] * len(ids) for ids in continuations]
        found[self._lost] = Failure("timeout", "no answer")
        return found


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


async def test_what_an_engine_did_not_tell_of_both_is_in_neither_likelihood(tmp_path: Path) -> None:
    held_out = comparison(tmp_path, 0.0)
    await held_out.record_initial(Engines(lost=0))  # type: ignore[arg-type]
    found = await held_out.finish(Engines(lost=1), ShorterIsBetter(), "0")  # type: ignore[arg-type]
    assert found.suffix_nll == (1.0, 1.0)  # the policy has not changed, though other tasks failed


def test_a_comparison_that_cannot_end_is_refused_before_training(tmp_path: Path) -> None:
    path, tasks, sampling = tmp_path / "initial.json", [Task(0, [1], [2], "text", "")], SamplingSettings(8)
    with pytest.raises(DataError, match="without --win-rate-prompts"):
        HeldOutComparison(tasks, [0], sampling, None, path, 0).check_initial()
    two = [*tasks, Task(1, [1], [2], "text", "")]
    InitialPolicyFile(path, two, sampling, "--x").write(
        InitialPolicy([Candidate("rollout", [1], "a"), None], [], [1.0, None])
    )
    with pytest.raises(DataError, match="continue with --win-rate-prompts 2"):
        HeldOutComparison(tasks, [0], sampling, None, path, 0).check_initial()
    HeldOutComparison(two, [0, 1], sampling, None, path, 0).check_initial()
    with pytest.raises(DataError, match=r"is of other sampling .*continue with the flags of the run's start"):
        HeldOutComparison(two, [0, 1], SamplingSettings(8, 0.5), None, path, 0).check_initial()
    other = [Task(0, [1], [3], "text", ""), two[1]]
    with pytest.raises(DataError, match="is of other tasks"):
        HeldOutComparison(other, [0, 1], sampling, None, path, 0).check_initial()
