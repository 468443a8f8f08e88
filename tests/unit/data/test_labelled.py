"""Labelled records: random access by (seed, index), pairs together, splits, and what is wrong with a file."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.errors import DataError
from megatron_sip.records import Task


class Writer:
    """Tasks whose prefix text is the record's own name; one that is called long does not fit."""

    identity = "writer"

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def fits(self, record: dict[str, Any]) -> bool:
        if "name" not in record:
            raise ValueError('"name" is missing')
        return "long" not in record["name"]

    def task(self, index: int, record: dict[str, Any]) -> Task:
        self.counts["made"] += 1
        return Task(index, [1], [], record["name"], "")


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records))
    return path


def source(path: Path, split: str = "1", part: Any = "train", seed: int = 7) -> LabelledSource:
    writer = Writer()
    return LabelledSource(open_records([str(path)], split, writer), part, writer, seed)


def some_records(pairs: int, singles: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs p0a, p0b, ... and single records s0, ..., in any order."""
    records = [{"name": f"p{i}{order}", "pair": f"p{i}", "text": "ü\u2028" * i} for i in range(pairs) for order in "ab"]
    records += [{"name": f"s{i}"} for i in range(singles)]
    random.Random(seed).shuffle(records)
    return records


@given(pairs=st.integers(0, 7), singles=st.integers(0, 7), seed=st.integers(0, 99))
def test_an_epoch_has_every_record_and_pairs_stand_together(
    tmp_path_factory: pytest.TempPathFactory, pairs: int, singles: int, seed: int
) -> None:
    if not pairs + singles:
        return
    records = some_records(pairs, singles, seed)
    tasks = source(write(tmp_path_factory.mktemp("records") / "a.jsonl", records), seed=seed)
    size = tasks.tasks_per_epoch
    assert size == 2 * pairs + singles + (singles % 2 if pairs else 0)
    orders = []
    for epoch in range(3):
        names = [task.prefix_text for task in tasks.tasks(epoch * size, size)]
        orders.append(names)
        assert set(names) == {record["name"] for record in records}
        assert size - len(set(names)) == (singles % 2 if pairs else 0)
        for place in range(0, 2 * pairs + singles, 2):
            two = [name for name in names[place : place + 2] if name.startswith("p")]
            assert not two or (len(two) == 2 and two[0][:-1] == two[1][:-1])
    if pairs > 4:
        assert orders[0] != orders[1]


def test_task_i_is_a_function_of_seed_and_i_in_any_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", some_records(20, 5))
    in_turn = [task.prefix_text for task in source(path).tasks(0, 100)]
    again = source(path)
    for index in random.Random(1).sample(range(100), 40):
        assert again.task(index).prefix_text == in_turn[index]
        assert again.task(index).index == index
    assert [task.prefix_text for task in source(path, seed=8).tasks(0, 100)] != in_turn
    assert again.take_counts() == {"tasks/made": 80}
    assert again.take_counts() == {}


def test_the_records_of_a_pair_are_not_independent(tmp_path: Path) -> None:
    tasks = source(write(tmp_path / "a.jsonl", some_records(6, 4)))
    names: dict[tuple[int, int], set[str]] = {}
    for index in range(16):
        names.setdefault(tasks.document(index), set()).add(tasks.task(index).prefix_text)
    assert sorted(map(len, names.values())) == [1] * 4 + [2] * 6


def test_splits_are_the_records_own_or_go_by_a_hash_that_others_do_not_move(tmp_path: Path) -> None:
    records = some_records(300, 400)
    for record in records[:20]:
        record.pop("pair", None)
        record["split"] = "test"
    path = write(tmp_path / "a.jsonl", records)

    def parts(path: Path) -> dict[str, set[str]]:
        sources = {part: source(path, "6,3,1", part) for part in ("train", "valid", "test")}
        return {part: {own.in_order(i).prefix_text for i in range(len(own))} for part, own in sources.items()}

    found = parts(path)
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 1000
    forced = {record["name"] for record in records[:20]}
    assert forced <= found["test"]
    assert 0.5 < len(found["train"]) / 980 < 0.7
    assert 0.22 < len(found["valid"]) / 980 < 0.38
    whole = {name[:-1] for name in found["train"] if name.startswith("p")}
    others = {name[:-1] for part in ("valid", "test") for name in found[part] - forced if name.startswith("p")}
    assert len(whole) > 100
    assert not whole & others
    more = parts(write(tmp_path / "b.jsonl", [{"name": "new"}, *records]))
    assert all(found[part] <= more[part] for part in found)


def test_of_a_pair_both_fit_or_none(tmp_path: Path) -> None:
    records = [{"name": "a", "pair": 1}, {"name": "a long", "pair": 1}, {"name": "b"}, {"name": "c long"}]
    tasks = source(write(tmp_path / "a.jsonl", records))
    assert [task.prefix_text for task in tasks.tasks(0, 1)] == ["b"]
    assert tasks.report(3) == {
        "split": "train",
        "records": 1,
        "pairs": 0,
        "too_long": 3,
        "tasks_per_epoch": 1,
        "epochs": 3.0,
    }
    assert tasks.summary(3) == "records 1; left out as too long 3; epochs in this run 3"


def test_pairs_of_two_files_are_not_each_others(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"name": "1", "pair": "x"}, {"name": "2", "pair": "x"}])
    write(tmp_path / "b.jsonl", [{"name": "3", "pair": "x"}, {"name": "4", "pair": "x"}])
    tasks = source(tmp_path / "*.jsonl")
    assert tasks.report()["pairs"] == 2
    assert {frozenset(task.prefix_text for task in tasks.tasks(place, 2)) for place in (0, 2)} == {
        frozenset("12"),
        frozenset("34"),
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"name": "a"}\n\n{oops}\n', r"a\.jsonl:3: not valid JSON .*'\{oops\}"),
        ("[1]\n", r"a\.jsonl:1: a line must be a JSON object, this one is a list"),
        ('{"name": "a"}\n{"nam": 1}', r'a\.jsonl:2: "name" is missing'),
        ('{"name": "a", "split": "dev"}', r'a\.jsonl:1: "split" is \'dev\'; it is one of train, valid, test'),
        ('{"name": "a", "pair": 1}\n' * 3, r"a\.jsonl:3: a third record of one \"pair\""),
        (
            '{"name": "a", "pair": 1, "split": "test"}\n{"name": "a", "pair": 1, "split": "train"}',
            r'a\.jsonl:2: another "split" than the other record of its "pair"',
        ),
        ("\n", r"a\.jsonl: no record in it"),
        ('{"name": "a", "split": "test"}', r"no record of the train split"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        source(tmp_path / "a.jsonl")


def test_weights_and_other_formats_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"name": "a"}])
    with pytest.raises(DataError, match="no weights"):
        open_records(["2", str(path)], "1", Writer())
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match="uncompressed JSON lines"):
        open_records([str(tmp_path / "a.jsonl.gz")], "1", Writer())


def test_the_fingerprint_changes_with_records_split_and_seed(tmp_path: Path) -> None:
    records = some_records(4, 4)
    path = write(tmp_path / "a.jsonl", records)
    prints = {source(path, seed=seed).fingerprint() for seed in (1, 1, 2)}
    prints |= {source(path, "1,1").fingerprint()}
    records[0]["name"] = records[0]["name"].upper()
    prints |= {source(write(path, records), seed=1).fingerprint()}
    assert len(prints) == 4


def test_a_file_that_is_changed_under_a_run_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"name": "a" * 40}])
    tasks = source(path)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"a\.jsonl, byte 0: not valid JSON"):
        tasks.task(0)
