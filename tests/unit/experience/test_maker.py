"""From answers of engines and teacher to examples: a failure drops its group with a reason and never becomes a candidate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import metaspace_tokenizer

from megatron_sip.experience.control import Control
from megatron_sip.experience.kind_steps import KindSteps
from megatron_sip.experience.maker import ExperienceMaker, ExperienceSettings, build_group
from megatron_sip.experience.selection import SelectionSettings
from megatron_sip.metrics import Mean, flatten
from megatron_sip.records import Candidate, Group, Task
from megatron_sip.rollout.pool import PoolCounters
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings

TASKS = [Task(index, [1, 2, 3 + index], [4, 5], "prefix", " suffix") for index in range(3)]


class Engines:
    """Answers as the pool does; the second task's prefix fails."""

    def __init__(self) -> None:
        self.counters = PoolCounters()
        self.versions: list[str] = []
        self.seeds: list[int] = []

    async def generate(
        self, prefixes: Sequence[list[int]], settings: Any, *, seeds: list[int] | None, weight_version: str
    ) -> list[Any]:
        self.versions.append(weight_version)
        self.seeds += seeds or []
        self.counters.calls += len(prefixes)
        made = [Completion([6 + n, 7], [-1.0, -2.0], "length", weight_version) for n in range(settings.n)]
        return [Failure("timeout", "no answer") if prefix == [1, 2, 4] else made for prefix in prefixes]


class Scores:
    """Prefers the first rollout."""

    async def score_on_arrival(
        self, arriving: Sequence[Awaitable[Group]], *, objective: str, progress: Callable[[int], object]
    ) -> list[Group]:
        async def judged(arrival: Awaitable[Group]) -> Group:
            group = await arrival
            progress(1)
            return group if group.dropped else self.scored(group)

        return await asyncio.gather(*map(judged, arriving))

    def scored(self, group: Group) -> Group:
        return replace(group, scores=[float(c.ids[0] == 6) for c in group.candidates])

    def counters(self) -> dict[str, float]:
        return {"calls": 7.0, "cached-share": 0.5}

    def means(self) -> dict[str, Mean]:
        self.asked = getattr(self, "asked", 0) + 1
        return {"label/accuracy": Mean(self.asked**2, 4.0 * self.asked)}


class Rewrites:
    """Rewrites every suffix, and notes for which tasks it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def begin(self, tasks: Sequence[Task]) -> list[asyncio.Task[Candidate | None]]:
        self.asked.append([task.index for task in tasks])
        return [asyncio.create_task(self.rewritten(task)) for task in tasks]

    async def rewritten(self, task: Task) -> Candidate:
        return Candidate("rewrite", [8, task.index], f"rewrite {task.index}")

    def counters(self) -> dict[str, float]:
        return {"rewrites": float(sum(map(len, self.asked)))}


class Tokenizer:
    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def maker(engines: Engines, start: int = 0) -> ExperienceMaker:
    settings = ExperienceSettings(
        ("suffix", "rollout"),
        SamplingSettings(2, n=2),
        SelectionSettings("dpo", candidates=("suffix", "rollout")),
        kind_steps=KindSteps(rollout_start=start),
    )
    return ExperienceMaker(settings, Tokenizer(), engines, Scores(), None)  # type: ignore[arg-type]


async def test_a_failed_prefix_is_dropped_by_reason_and_the_others_are_learnt_from() -> None:
    engines = Engines()
    experience = await maker(engines).make(5, TASKS)
    numbers = flatten(experience.metrics)
    assert [example.task_index for example in experience.examples] == [0, 2]
    assert all(example.branches[0].ids == [6, 7] for example in experience.examples)
    assert numbers["dropped/rollout timeout"] == 1
    assert numbers["groups"] == 3
    assert engines.versions == ["5"] * len(TASKS)  # nothing but the weights of this step


async def test_counters_are_per_step_and_shares_stay_shares() -> None:
    engines = Engines()
    making = maker(engines)
    first, second = [flatten((await making.make(step, TASKS)).metrics) for step in (0, 1)]
    assert first["rollout/calls"] == second["rollout/calls"] == 3
    assert (first["judge/calls"], second["judge/calls"]) == (7, 0)
    assert first["judge/cached-share"] == second["judge/cached-share"] == 0.5
    assert (first["judge/label/accuracy"], second["judge/label/accuracy"]) == (
        0.25,
        0.75,
    )  # 1 of 4, then 3 of the next 4


async def test_rollouts_wait_for_their_start_step() -> None:
    engines = Engines()
    experience = await maker(engines, start=3).make(2, TASKS)
    assert engines.versions == []
    assert experience.examples == []  # the suffix alone makes no pair, and that is counted
    assert sum(value for name, value in flatten(experience.metrics).items() if name.startswith("dropped/")) == 3


class SuffixAgain(Engines):
    """Writes the suffix " brown fox jumps" of METASPACE_TASK, and its beginning."""

    async def generate(
        self, prefixes: Sequence[list[int]], settings: Any, *, seeds: list[int] | None, weight_version: str
    ) -> list[Any]:
        ids = METASPACE_TASK.suffix_ids
        return [[Completion(i, [-1.0] * len(i), "length", weight_version) for i in (ids, ids[:-6])]]


def metaspace_task() -> Task:
    whole = METASPACE.encode("The quick brown fox jumps", add_special_tokens=False)
    cut = len(METASPACE.encode("The quick", add_special_tokens=False))
    return Task(0, whole[:cut], whole[cut:], "The quick", " brown fox jumps")


METASPACE = metaspace_tokenizer()
METASPACE_TASK = metaspace_task()


async def test_the_judge_reads_rollouts_as_they_follow_the_prefix() -> None:
    settings = ExperienceSettings(("suffix", "rollout"), SamplingSettings(64, n=2), SelectionSettings("dpo"))
    judged: list[Group] = []

    class Watch(Scores):
        def scored(self, group: Group) -> Group:
            judged.append(group)
            return super().scored(group)

    making = ExperienceMaker(settings, METASPACE, SuffixAgain(), Watch(), None)  # type: ignore[arg-type]
    await making.make(0, [METASPACE_TASK])
    assert [c.text for c in judged[0].candidates] == [" brown fox jumps", " brown fox jumps", " brown fox"]


def test_a_missing_rewrite_only_leaves_the_group_without_it() -> None:
    rollouts = [Candidate("rollout", [9], "x")]
    group = build_group(TASKS[0], ["suffix", "rewrite", "rollout"], rollouts, None)
    assert [candidate.kind for candidate in group.candidates] == ["suffix", "rollout"]
    assert group.dropped is None
    assert build_group(TASKS[0], ["suffix", "rollout"], "timeout", None).dropped == "rollout timeout"


def rewriting(rewriter: Rewrites) -> ExperienceMaker:
    settings = ExperienceSettings(
        ("suffix", "rewrite"),
        SamplingSettings(2),
        SelectionSettings("sft", candidates=("suffix", "rewrite"), sft_target="rewrite"),
    )
    return ExperienceMaker(settings, Tokenizer(), None, None, rewriter)  # type: ignore[arg-type]


async def test_the_next_step_s_rewrites_are_made_while_this_one_trains() -> None:
    rewriter = Rewrites()
    making = rewriting(rewriter)
    await making.make(0, TASKS[:1], TASKS[1:])
    await asyncio.sleep(0)  # training: the loop goes on
    assert rewriter.asked == [[0], [1, 2]]
    experience = await making.make(1, TASKS[1:])
    assert rewriter.asked == [[0], [1, 2]]  # not asked for again
    assert [[branch.ids for branch in example.branches] for example in experience.examples] == [[[8, 1]], [[8, 2]]]


async def test_rewrites_that_have_ended_are_not_asked_for_ahead() -> None:
    rewriter = Rewrites()
    settings = ExperienceSettings(
        ("suffix", "rewrite"),
        SamplingSettings(2),
        SelectionSettings("rf-nll", candidates=("suffix", "rewrite")),
        kind_steps=KindSteps(rewrite_end=1),
    )
    making = ExperienceMaker(settings, Tokenizer(), None, Scores(), rewriter)  # type: ignore[arg-type]
    await making.make(0, TASKS[:1], TASKS[1:2])
    await asyncio.sleep(0)
    experience = await making.make(1, TASKS[1:2], TASKS[2:])
    assert rewriter.asked == [[0]]
    assert [branch.kind for example in experience.examples for branch in example.branches] == ["suffix"]


async def test_a_suffix_that_has_ended_is_not_judged_nor_taken_from_recorded_groups(tmp_path: Path) -> None:
    settings = ExperienceSettings(
        ("suffix", "rollout"),
        SamplingSettings(2, n=2),
        SelectionSettings("rf-nll", candidates=("suffix", "rollout")),
        record=tmp_path,
    )
    whole = await ExperienceMaker(settings, Tokenizer(), Engines(), Scores(), None).make(0, TASKS[:1])  # type: ignore[arg-type]
    ends = replace(settings, kind_steps=KindSteps(suffix_end=4), record=None)
    later = await ExperienceMaker(ends, Tokenizer(), Engines(), Scores(), None).make(4, TASKS[:1])  # type: ignore[arg-type]
    assert flatten(whole.metrics)["length/suffix"] == 2
    assert "length/suffix" not in flatten(later.metrics)
    replayed = replace(ends, replay=tmp_path, kind_steps=KindSteps(suffix_end=0))
    again = await ExperienceMaker(replayed, Tokenizer(), None, None, None).make(0, TASKS[:1])
    assert "chosen_rate/suffix" in flatten(whole.metrics)
    assert "chosen_rate/suffix" not in flatten(again.metrics)


class SafetyScores(Scores):
    """Every candidate is worth its place; the rollouts are unsafe."""

    def scored(self, group: Group) -> Group:
        return replace(
            group,
            scores=[float(-i) for i, _ in enumerate(group.candidates)],
            criterion_scores={"safety": [float(c.kind == "suffix") for c in group.candidates]},
        )


async def test_control_texts_are_put_before_the_prefixes_in_the_policy_s_tokens() -> None:
    control = Control("safety", "The quick", "brown")
    settings = ExperienceSettings(
        ("suffix", "rollout"), SamplingSettings(64, n=2), SelectionSettings("rf-nll", control=control)
    )
    making = ExperienceMaker(settings, METASPACE, SuffixAgain(), SafetyScores(), None)  # type: ignore[arg-type]
    good, bad = (await making.make(0, [METASPACE_TASK])).examples
    for example, text in ((good, "The quick"), (bad, "brown")):
        assert example.prefix_ids[: example.head] == METASPACE.encode(text, add_special_tokens=False)
        assert example.prefix_ids[example.head :] == METASPACE_TASK.prefix_ids
        assert [branch.engine_logprobs for branch in example.branches] == [None]
    assert (good.branches[0].ids, bad.branches[0].ids) == (METASPACE_TASK.suffix_ids, METASPACE_TASK.suffix_ids[:-6])


async def test_rewrites_for_other_tasks_are_never_used() -> None:
    making = rewriting(Rewrites())
    await making.make(0, TASKS[:1], TASKS[1:])
    with pytest.raises(ValueError, match=r"made ahead for tasks \[1, 2\]"):
        await making.make(1, TASKS[:1])


async def test_groups_that_the_disk_does_not_take_are_told_and_cost_no_example(tmp_path: Path) -> None:
    making = maker(Engines())
    (tmp_path / "file").write_text("no folder")
    making._settings = replace(making._settings, record=tmp_path / "file" / "groups")
    experience = await making.make(0, TASKS)
    assert len(experience.examples) == 2
    assert experience.unrecorded == f"--save-groups {tmp_path}/file/groups took no more: Not a directory"


async def test_a_task_s_rollouts_have_one_seed_whoever_asks_for_them_and_when() -> None:
    whole, parts, other, unseeded = Engines(), Engines(), Engines(), Engines()
    for engines, seed, shares in (
        (whole, 5, [TASKS]),
        (parts, 5, [TASKS[2:], TASKS[:2]]),
        (other, 6, [TASKS]),
        (unseeded, None, [TASKS]),
    ):
        making = maker(engines)
        making._settings = replace(making._settings, rollout_seed=seed)
        for share in shares:
            await making.make(0, share)
    assert len(set(whole.seeds)) == len(TASKS)
    assert parts.seeds == [*whole.seeds[2:], *whole.seeds[:2]]
    assert set(other.seeds).isdisjoint(whole.seeds)
    assert unseeded.seeds == []


async def test_rollouts_by_the_weights_before_the_last_update_say_their_age() -> None:
    engines = Engines()
    making = maker(engines)
    assert flatten((await making.make(4, TASKS)).metrics)["staleness"] == 0
    assert flatten((await making.make(5, TASKS, version="4")).metrics)["staleness"] == 1
    assert engines.versions == ["4"] * 6
