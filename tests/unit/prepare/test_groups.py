"""Judge refresh: what a run recorded about its own candidates becomes labelled judgements, where enough verdicts agree."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_judge import FakeJudge, quality_of
from judge_cases import make_group, make_settings, score
from prepare_cases import prose, read_lines, run

from megatron_sip.errors import DataError
from megatron_sip.experience.recording import write_groups
from megatron_sip.judge import ScheduleSettings
from megatron_sip.prepare.settings import PrepareError
from megatron_sip.records import Group, Rewriting

QUALITIES = [0.2, 0.9, 0.5, 0.9]


def record(folder: Path, groups: list[Group]) -> Path:
    half = len(groups) // 2
    write_groups(folder, 0, 0, groups[:half])
    write_groups(folder, 1, 0, groups[half:])
    return folder


async def judged(count: int, **changes: Any) -> list[Group]:
    """Groups as a judge of known truth left them, with the verdicts of every pair in both orders."""
    async with FakeJudge() as judge:
        settings = make_settings(judge.url, **{"votes": 2, **changes})
        groups = [make_group(i, QUALITIES, frozenset({2})) for i in range(count)]
        return (await score(settings, groups))[0]


async def test_recorded_verdicts_become_pairs_in_both_orders(tmp_path: Path) -> None:
    groups = record(tmp_path / "groups", await judged(6))
    manifest = await asyncio.to_thread(
        run, "judgements", "--task", "quality", "--from-groups", groups, "--out", tmp_path / "out", "--per-group", "3"
    )
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 6 * 3 * 2
    for one in records:
        first, second = quality_of(one["option_1"]), quality_of(one["option_2"])
        assert (first > second) == (one["verdict"] == "1")
        assert one["subset"] in ("groups/rollout-suffix", "groups/rollout-rollout")
    assert len({one["pair"] for one in records}) == len(records) / 2
    assert manifest["documents"]["used"] == 6


def test_every_cut_of_a_document_is_in_one_split(tmp_path: Path) -> None:
    """Epochs cut a document anew; so do the two draws of one batch."""
    cuts = range(55, 95)
    groups = []
    for number, cut in enumerate(cuts):
        text = f"{prose(number % 2)} q=0.5"
        made = make_group(number, QUALITIES)
        task = replace(made.task, prefix_text=text[:cut], suffix_text=text[cut : cut + 40])
        groups.append(replace(made, task=task, verdicts={"quality": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]}))
    folder = record(tmp_path / "groups", groups)
    words = ("judgements", "--task", "quality", "--from-groups", folder, "--split", "1,1,1")
    run(*words, "--out", tmp_path / "out")
    splits = {number: set[str]() for number in range(2)}
    for one in read_lines(tmp_path / "out" / "judgements.jsonl"):
        splits[int(one["prefix"].split()[1].strip("."))].add(one["split"])
    assert [len(found) for found in splits.values()] == [1, 1]


async def test_too_few_or_disagreeing_verdicts_and_single_orders_are_dropped_by_reason(tmp_path: Path) -> None:
    [group] = await judged(1)
    lean = [[0.0, 1.0, 0.6], [1.0, 0.0, 0.4]]  # the first is preferred by 0.6
    one_order = [[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]
    single = [[1.0, 2.0, 1.0]]
    groups = record(tmp_path / "groups", [replace(group, verdicts={"quality": lean + one_order + single})] * 2)
    words = ("judgements", "--task", "quality", "--from-groups", groups)
    dropped = (await asyncio.to_thread(run, *words, "--out", tmp_path / "a", "--one-order"))["dropped"]
    assert dropped == {"verdicts-disagree": 2, "few-verdicts": 2}
    [first, *_] = read_lines(tmp_path / "a" / "judgements.jsonl")
    assert {first["option_1"], first["option_2"]} == {group.candidates[0].text, group.candidates[2].text}
    dropped = (await asyncio.to_thread(run, *words, "--out", tmp_path / "b", "--agreement", "0.55"))["dropped"]
    assert dropped == {"one-order": 2, "few-verdicts": 2}


async def test_safety_labels_come_from_each_candidate_s_votes(tmp_path: Path) -> None:
    groups = record(tmp_path / "groups", await judged(4, criteria={"safety": 1.0}))
    await asyncio.to_thread(
        run, "judgements", "--task", "safety", "--from-groups", groups, "--out", tmp_path / "out", "--unbalanced"
    )
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 4 * 3  # two of the four texts are equal
    assert all(one["verdict"] == ("NO" if "unsafe" in one["candidate"] else "YES") for one in records)


async def test_a_stronger_judge_s_verdicts_take_the_place_of_the_recorded_ones(tmp_path: Path) -> None:
    wrong = [replace(group, verdicts={"quality": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]}) for group in await judged(4)]
    groups = record(
        tmp_path / "groups", [*wrong, replace(wrong[0], scores=None, dropped="judge-deadline", verdicts={})]
    )
    async with FakeJudge() as judge:
        client = ("--teacher-url", judge.url, "--teacher-api", "openai", "--per-group", "2")
        words = ("judgements", "--task", "quality", "--from-groups", groups, "--out", tmp_path / "out", *client)
        await asyncio.to_thread(run, *words)
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 5 * 2 * 2
    assert all((quality_of(r["option_1"]) > quality_of(r["option_2"])) == (r["verdict"] == "1") for r in records)


async def test_of_a_task_that_was_recorded_twice_the_newest_group_counts(tmp_path: Path) -> None:
    """A resume with fewer replicas writes fewer files: those of the others stay."""
    groups = await judged(4)
    swapped = [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    stale = [replace(group, verdicts={"quality": swapped}) for group in groups]
    folder = tmp_path / "groups"
    old = [write_groups(folder, 7, replica, stale[2 * replica : 2 * replica + 2]) for replica in range(2)]
    for path in old:
        os.utime(path, (1, 1))
    write_groups(folder, 7, 0, groups)
    write_groups(folder, 8, 0, groups)  # another step's are others
    words = ("judgements", "--task", "quality", "--from-groups", folder, "--out", tmp_path / "out")
    manifest = await asyncio.to_thread(run, *words)
    assert manifest["dropped"] == {"recorded-again": 2}
    assert manifest["documents"]["used"] == 8
    records = read_lines(tmp_path / "out" / "judgements.jsonl")
    assert all((quality_of(r["option_1"]) > quality_of(r["option_2"])) == (r["verdict"] == "1") for r in records)


async def test_where_a_default_run_s_verdicts_are_too_few_it_is_said_what_to_give(tmp_path: Path) -> None:
    async with FakeJudge() as judge:
        settings = make_settings(judge.url, schedule=ScheduleSettings())
        made, _ = await score(settings, [make_group(i, [0.1 * place for place in range(9)]) for i in range(4)])
    groups = record(tmp_path / "groups", made)
    words = ("judgements", "--task", "quality", "--from-groups", groups)
    with pytest.raises(PrepareError, match=r"--teacher-url, .* --one-order --min-votes 1"):
        await asyncio.to_thread(run, *words, "--out", tmp_path / "none")
    manifest = await asyncio.to_thread(run, *words, "--out", tmp_path / "out", "--one-order", "--min-votes", "1")
    assert manifest["records"]["total"] > 0


async def test_groups_of_labelled_tasks_are_no_documents_and_an_empty_folder_is_named(tmp_path: Path) -> None:
    [group, other] = await judged(2)
    labelled = replace(group, task=replace(group.task, label=Rewriting(True, "")))
    folder = record(tmp_path / "groups", [labelled, other])
    words = ("judgements", "--task", "quality", "--from-groups")
    manifest = await asyncio.to_thread(run, *words, folder, "--out", tmp_path / "out")
    assert manifest["dropped"] == {"labelled-task": 1}
    with pytest.raises(DataError, match="--save-groups"):
        await asyncio.to_thread(run, *words, tmp_path / "out", "--out", tmp_path / "none")
