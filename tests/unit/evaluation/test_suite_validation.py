"""What a run measures of held-out documents: by hand, with what no engine or judge answered counted apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_tokenizer import metaspace_tokenizer

from megatron_sip.errors import DataError
from megatron_sip.evaluation.plots import available_plots, render_png
from megatron_sip.evaluation.suite_validation import SuiteValidation
from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import Group, Task
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings

TOKENIZER = metaspace_tokenizer()
WORDS = {"0": "The quick", "2": "The quick brown fox"}
"""What the policy says at each step."""


class Engines:
    """Answers about all but the last prefix; each token of a suffix has a log-prob of minus its id."""

    def __init__(self) -> None:
        self.versions: list[str] = []

    async def generate(self, prefixes: Sequence[Any], sampling: SamplingSettings, *, weight_version: str) -> list[Any]:
        ids = TOKENIZER.encode(WORDS[weight_version], add_special_tokens=False)
        made = [[Completion(ids, [-1.0] * len(ids), "length", weight_version)] for _ in prefixes[:-1]]
        return [*made, Failure("timeout", "no answer")]

    async def logprobs(
        self, prefixes: Sequence[Any], continuations: Sequence[Sequence[int]], *, weight_version: str
    ) -> list[Any]:
        self.versions.append(weight_version)
        return [*([-float(token) for token in ids] for ids in continuations[:-1]), Failure("timeout", "no answer")]


class LongerIsBetter:
    """Compares as an ordinary judge, and has no verdict about the first prefix."""

    weights: ClassVar = {"quality": 1.0}

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        judged = []
        for group in groups:
            before, after = (len(c.text) for c in group.candidates)
            scores = [float(before > after), float(after > before)]
            scored = replace(group, scores=scores, criterion_scores={"quality": scores})
            judged.append(replace(group, dropped="no verdict") if group.task.index == 0 else scored)
        return judged

    def counters(self) -> dict[str, float]:
        return {}

    def means(self) -> dict[str, Mean]:
        return {}


class Rater:
    """Two of three votes call a continuation of a prompt with an odd number safe; about the first it says nothing."""

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        return [
            replace(group, dropped="no verdict")
            if group.task.index == 0
            else replace(group, scores=[0.5], verdicts=said(group))
            for group in groups
        ]


def said(group: Group) -> Any:
    return {"safety": [(0, float(vote < 1 + group.task.index % 2)) for vote in range(3)]}


class Silent:
    """A judge without a verdict."""

    weights: ClassVar = {"quality": 1.0}

    async def score(self, groups: Sequence[Group], *, objective: str) -> list[Group]:
        return [replace(group, dropped="no verdict") for group in groups]


class Down:
    """Engines without an answer."""

    async def generate(self, prefixes: Sequence[Any], sampling: SamplingSettings, *, weight_version: str) -> list[Any]:
        return [Failure("timeout", "no answer")] * len(prefixes)

    async def logprobs(
        self, prefixes: Sequence[Any], continuations: Sequence[Any], *, weight_version: str
    ) -> list[Any]:
        return [Failure("timeout", "no answer")] * len(prefixes)


def validation(folder: Path, *suites: str, prompts: Sequence[Task] = ()) -> SuiteValidation:
    tasks = [Task(index, [1], list(range(1, index + 2)), "text", "") for index in range(4)]
    sets = {"toxigen": prompts} if prompts else {}
    initial = folder / "initial_evaluation.json"
    return SuiteValidation(suites, tasks, range(4), sets, SamplingSettings(8), TOKENIZER, initial, 0)


async def measured(
    folder: Path,
    *suites: str,
    versions: Sequence[str] = ("0", "2"),
    prompts: Sequence[Task] = (),
    judge: Any = None,
    engines: Any = None,
) -> list[Metrics]:
    made = validation(folder, *suites, prompts=prompts)
    return [
        await made.measure(engines or Engines(), judge or LongerIsBetter(), Rater(), version) for version in versions
    ]  # type: ignore[arg-type]


async def test_nll_is_over_tokens_and_what_failed_is_counted(tmp_path: Path) -> None:
    [found] = await measured(tmp_path, "nll", versions=("2",))
    assert found == {
        "validation/nll/suffix": Mean(1.0 + (1 + 2) + (1 + 2 + 3), 6.0),
        "validation/failed/nll timeout": 1.0,
    }


async def test_win_rates_are_over_the_initial_policy(tmp_path: Path) -> None:
    before, after = await measured(tmp_path, "win-rate")
    assert before == {"validation/failed/no continuation": 1.0}
    assert after == {
        "validation/failed/no continuation": 1.0,
        "validation/failed/no verdict": 1.0,
        "validation/win-rate/initial": 1.0,
    }


async def test_a_run_that_goes_on_compares_with_what_it_began_with(tmp_path: Path) -> None:
    await measured(tmp_path, "win-rate", versions=("0",))
    [found] = await measured(tmp_path, "win-rate", versions=("2",))
    assert found["validation/win-rate/initial"] == 1.0


async def test_a_judge_that_says_nothing_is_counted_and_ends_no_run(tmp_path: Path) -> None:
    await measured(tmp_path, "win-rate", versions=("0",))
    [found] = await measured(tmp_path, "win-rate", versions=("2",), judge=Silent())
    assert found == {"validation/failed/no continuation": 1.0, "validation/failed/no verdict": 3.0}


async def test_engines_that_say_nothing_are_counted_and_are_no_diversity_of_zero(tmp_path: Path) -> None:
    [found] = await measured(tmp_path, "diversity", "nll", versions=("0",), engines=Down())
    assert found == {"validation/failed/no continuation": 4.0, "validation/failed/nll timeout": 4.0}


def test_a_run_that_goes_on_without_what_it_began_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without --eval-records"):
        validation(tmp_path, "win-rate").check_initial()
    validation(tmp_path, "nll").check_initial()


async def test_diversity_is_of_the_continuations(tmp_path: Path) -> None:
    _, found = await measured(tmp_path, "diversity")
    assert found["validation/diversity/distinct-3"] == pytest.approx(2 / 6)
    assert found["validation/diversity/words"] == 4.0


async def test_continuations_of_a_set_are_safe_where_most_votes_say_so(tmp_path: Path) -> None:
    prompts = [Task(index, [1], [], f"prompt {index}", "") for index in range(7)]
    [found] = await measured(tmp_path, versions=("0",), prompts=prompts)
    assert found == {
        "validation/failed/no continuation": 1.0,  # the last
        "validation/failed/no verdict": 1.0,  # the first
        "validation/safety/toxigen": Mean(3.0, 5.0),  # of 1, 2, 3, 4, 5
    }


async def test_the_report_draws_them(tmp_path: Path) -> None:
    found = await measured(tmp_path, "nll", "diversity", "win-rate")
    steps = [
        {
            "step": float(step),
            **{name: value.value if isinstance(value, Mean) else value for name, value in one.items()},
        }
        for step, one in zip((0, 2), found, strict=True)
    ]
    plots = [plot for plot in available_plots(steps) if plot.name.startswith("validation_")]
    assert [plot.name for plot in plots] == ["validation_judged", "validation_text"]
    assert all(render_png(plot, steps).startswith(b"\x89PNG") for plot in plots)
