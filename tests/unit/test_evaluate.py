"""Comparisons by megatron-sip-evaluate: the paper's protocol as its defaults, ends that count, refusals."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from fake_judge import FakeJudge, truthful_answer

from megatron_sip.config.teacher_settings import judge_settings
from megatron_sip.evaluate import command_line, main
from megatron_sip.evaluation.commands.compare import compared
from megatron_sip.evaluation.generation import ENDED, FORMAT, Generation
from megatron_sip.evaluation.win_rate import WinRate


def write(path: Path, texts: list[str], finish: str = "length", **header: str) -> Path:
    lines = [
        {
            "index": i,
            "document": f"0:{i}",
            "prefix": f"Text {i} ",
            "suffix": "x",
            "text": text,
            "ids": [3],
            "finish_reason": finish,
        }
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"format": FORMAT, **header}, *lines]))
    return path


def compare_files(base: Path, model: Path, judge: FakeJudge, *flags: str) -> WinRate:
    """What `compare` finds with its own defaults, but for the server's kind."""

    async def work() -> WinRate:
        async with judge as server:
            words = ["compare", str(base), str(model), "--teacher-url", server.url, "--teacher-api", "openai"]
            given = command_line().parse_args([*words, "--teacher-name", "fake", *flags])
            return await compared(judge_settings(given), base, model, given.seed)

    return asyncio.run(work())


def test_eight_judgements_four_in_each_order_and_a_judge_of_places_decides_nothing(tmp_path: Path) -> None:
    base = write(tmp_path / "base.jsonl", ["q=0.1", "q=0.2"])
    model = write(tmp_path / "model.jsonl", ["q=0.8", "q=0.9"])
    first = FakeJudge(answer=lambda prompt: "Conclusion: Option 1")
    found = compare_files(base, model, first)
    assert found.win_rate == 0.5
    assert [body["n"] for body in first.bodies] == [4] * 4  # two pairs in both orders
    assert {body["temperature"] for body in first.bodies} == {0.7}
    assert len({prompt.split("[begin option 1")[1] for prompt in first.prompts}) == 4


def test_the_better_model_wins_all(tmp_path: Path) -> None:
    base, model = write(tmp_path / "base.jsonl", ["q=0.1"] * 3), write(tmp_path / "model.jsonl", ["q=0.8"] * 3)
    found = compare_files(base, model, FakeJudge(answer=truthful_answer))
    assert (found.win_rate, found.prompts, found.documents, found.failed) == (1.0, 3, 3, 0)
    assert compare_files(model, base, FakeJudge(answer=truthful_answer)).win_rate == 0.0


def test_a_continuation_that_ended_is_judged_with_its_end_whatever_its_model_calls_it() -> None:
    ended, cut = (Generation(0, "0:0", "p", "s", "t", [7, 49], finish).candidate for finish in ("stop", "length"))
    assert ended.ids[-1] == ENDED
    assert cut.ids[-1] != ENDED
    assert (ended.truncated, cut.truncated) == (False, True)


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    base, model = write(tmp_path / "base.jsonl", ["a", "b"]), write(tmp_path / "model.jsonl", ["a"])
    with pytest.raises(SystemExit, match=r"2 generations, .*model\.jsonl 1"):
        main(["compare", str(base), str(model), "--teacher-url", "http://127.0.0.1:1"])
    other = write(tmp_path / "other.jsonl", ["a"])
    other.write_text(other.read_text().replace("Text 0", "Else"))
    with pytest.raises(SystemExit, match="task 0 has another prefix"):
        main(["compare", str(model), str(other), "--teacher-url", "http://127.0.0.1:1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "--url", "http://127.0.0.1:1", "--data-path", "x", "--output", "y", "--samples", "1"],
            "--tokenizer",
        ),
        (
            ["generate", "--model", "nowhere", "--data-path", "x", "--output", "y", "--samples", "1"],
            "neither an HF folder .* nor a checkpoint",
        ),
        (["generate", "--model", "x", "--data-path", "x", "--output", "y", "--samples", "0"], "--samples 0"),
        (["diversity", "nowhere.jsonl"], r"nowhere\.jsonl"),
        (["compare", "a", "b"], "--teacher-url"),
        (["compare", "a", "b", "--criteria", "label=1"], "--criteria label: .*--tasks judgements"),
    ],
)
def test_mistakes_name_what_would_be_right(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(words)
