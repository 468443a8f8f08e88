"""Accuracy of a judge: against counts by hand, per order and averaged, with unread and failed questions told apart."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_judge import FakeJudge
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.errors import DataError
from megatron_sip.evaluation.judge_accuracy import ALL, Labelled, accuracy, markdown, read_labelled
from megatron_sip.judge.__main__ import main
from megatron_sip.judge.exam import Question, Reply


def pair(number: int, subset: str = "wiki") -> list[Labelled]:
    texts = {"prefix": "p", "reference": "s"}
    orders = [("1", ("good", "bad")), ("2", ("bad", "good"))]
    return [
        Labelled(Question("quality", texts | {"option_1": a, "option_2": b}), verdict, str(number), subset)
        for verdict, (a, b) in orders
    ]


def test_figures_are_those_counted_by_hand() -> None:
    labelled = [*pair(0), *pair(1), *pair(2, "code"), *pair(3, "code")]
    replies = [
        *(Reply((1.0,)), Reply((0.0,))),  # right in both orders
        *(Reply((0.9,)), Reply((0.6,))),  # always the first: right by the mean of both orders
        *(Reply(unread=1), Reply((0.0,))),
        *(Reply(failed="status"), Reply((0.5,))),
    ]
    report = accuracy(labelled, replies, "m", seed=1)
    total = report[ALL]
    assert report["failed"] == 1
    assert total["records"] == total["verdicts"] == 7
    assert total["accuracy"] == pytest.approx((1 + 1 + 1 + 0 + 0 + 1 + 0.5) / 7)
    assert total["by_verdict"] == {"1": pytest.approx(2 / 3), "2": pytest.approx(2.5 / 4)}
    assert total["first_option"] == pytest.approx((1 + 0 + 1 + 1 + 0 + 0.5) / 6)
    assert total["first_option_lean"] == pytest.approx((1 + 0 + 0.9 + 0.6 + 0 + 0.5) / 6)
    assert (total["unread"], total["pairs"], total["both_orders"], total["in_each_order"]) == (1, 2, 1.0, 0.5)
    assert report["subsets"]["wiki"]["accuracy"] == 0.75
    low, high = total["accuracy_ci95"]
    assert low <= total["accuracy"] <= high
    shown = markdown([report])
    assert "| m | 50.0 | 75.0 | 64.3 |" in shown
    assert "1 of 7" in shown


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_a_judge_that_only_knows_positions_is_at_half(values: list[tuple[float, float]]) -> None:
    """Whatever it says of a pair, it says in both orders."""
    labelled = [one for i in range(len(values)) for one in pair(i)]
    report = accuracy(labelled, [Reply((value,)) for value, _ in values for _ in range(2)], "m", seed=1)
    assert report[ALL]["accuracy"] == pytest.approx(0.5)
    assert report[ALL]["first_option"] == pytest.approx(np.mean([0.5 if v == 0.5 else v > 0.5 for v, _ in values]))


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=9), st.sampled_from([0.0, 0.5, 1.0]))
def test_written_verdicts_of_many_labels_are_right_when_they_are_the_label(votes: list[float], target: float) -> None:
    labels = {1.0: "No", 0.5: "Possible", 0.0: "Definite"}
    texts = {"prefix": "", "reference": "", "candidate": "c"}
    labelled = Labelled(Question("factuality:v4", texts), labels[target], "0", "x")
    report = accuracy([labelled], [Reply(tuple(votes))], "m", seed=1)
    assert report[ALL]["accuracy"] == pytest.approx(np.mean([vote == target for vote in votes]))


def records(count: int) -> list[dict[str, Any]]:
    """Pairs in both orders whose texts tell their quality, and single texts that tell their safety."""
    made: list[dict[str, Any]] = []
    for i in range(count):
        good, bad = f"text {i} q=0.9", f"text {i} q=0.1"
        common = {
            "criterion": "quality",
            "prefix": f"p {i}",
            "suffix": good,
            "pair": str(i),
            "subset": "a",
            "split": "valid",
        }
        made.append(common | {"verdict": "1", "option_1": good, "option_2": bad})
        made.append(common | {"verdict": "2", "option_1": bad, "option_2": good})
        safety = {"criterion": "safety", "prefix": "", "suffix": "", "subset": "b", "split": "test"}
        made.append(safety | {"verdict": "NO", "candidate": f"unsafe {i}"})
    return made


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


async def test_the_command_measures_a_judge_of_known_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "records.jsonl", records(6))
    words = ["accuracy", str(path), "--judge-verdict", "hard", "--judge-votes", "2", "--save", str(tmp_path / "a.json")]
    async with FakeJudge() as judge:
        client = ["--teacher-url", judge.url, "--teacher-api", "openai", "--teacher-name", "truth"]
        await asyncio.to_thread(main, [*words, *client])
        report = json.loads((tmp_path / "a.json").read_text())
        assert report[ALL]["accuracy"] == 1.0
        assert report[ALL]["verdicts"] == 2 * 18
        assert report[ALL]["first_option"] == 0.5
        assert report["subsets"].keys() == {"a", "b"}
        asked = judge.requests
        await asyncio.to_thread(main, [*words, *client, "--split", "valid", "--beside", str(tmp_path / "a.json")])
        assert judge.requests - asked == 12
    assert (
        capsys.readouterr().out.count("| truth |") == 2 + 4
    )  # one row in each table of the first, two in those of the second


async def test_a_judge_that_always_says_the_first_and_a_mute_one(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", [one for one in records(5) if one["criterion"] == "quality"])
    for answer, right, first, unread in (("Conclusion: Option 1", 0.5, 1.0, 0), ("Perhaps.", 0.0, None, 10)):
        async with FakeJudge(answer=lambda prompt, answer=answer: answer) as judge:
            client = ["--teacher-url", judge.url, "--teacher-api", "openai", "--judge-verdict", "hard"]
            await asyncio.to_thread(main, ["accuracy", str(path), *client, "--save", str(tmp_path / "b.json")])
        figures = json.loads((tmp_path / "b.json").read_text())[ALL]
        assert (figures["accuracy"], figures.get("first_option"), figures["unread"]) == (right, first, unread)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"verdict": "3"}, "record 1: the verdict '3' is none of quality's: 1, 2"),
        ({"criterion": "beauty"}, "record 1: no prompt 'beauty'"),
        ({"option_2": None}, "record 1: field 'option_2' must be a text"),
    ],
)
def test_wrong_records_are_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = write(tmp_path / "records.jsonl", [records(1)[0] | change])
    with pytest.raises(DataError, match=told):
        read_labelled(path)
