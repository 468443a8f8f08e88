"""Shares of a judge's labels by criterion and version, and the agreement of two runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from fake_judge import FakeJudge

from megatron_sip.errors import DataError
from megatron_sip.evaluation.judge_labels import (
    FAILED,
    UNREAD,
    agreement,
    label_run,
    markdown,
    questions,
    read_continuations,
    require_same,
)
from megatron_sip.judge.__main__ import main
from megatron_sip.judge.exam import Reply

TEXTS = [{"prefix": f"p{i}", "reference": "s", "candidate": f"c{i}"} for i in range(4)]
CRITERIA = ["factuality:v1", "factuality-noref:v2"]
NO, POSSIBLE, DEFINITE = "No", "Possible", "Definite"


def test_labels_and_agreement_are_counted() -> None:
    one = label_run(TEXTS, CRITERIA, [Reply((v,)) for v in (1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0)], "one")
    replies = [
        Reply((1.0, 1.0, 0.0)),
        Reply((0.5,)),
        Reply(unread=1),
        Reply((0.0,)),
        *[Reply((1.0,))] * 3,
        Reply(failed="status"),
    ]
    two = label_run(TEXTS, CRITERIA, replies, "two")
    assert one["criteria"]["factuality:v1"]["labels"] == [NO, NO, POSSIBLE, DEFINITE]
    assert two["criteria"]["factuality:v1"]["labels"] == [NO, POSSIBLE, UNREAD, DEFINITE]
    assert two["criteria"]["factuality-noref:v2"]["labels"] == [NO, NO, NO, FAILED]
    assert agreement(one, two) == {"factuality:v1": pytest.approx(2 / 3), "factuality-noref:v2": 1.0}
    shown = markdown(one, [two])
    assert "| factuality:v1 | 2 (50.0%) | 1 (25.0%) | 1 (25.0%) |" in shown
    assert "66.67% - 100.00% (83.33%)" in shown
    require_same(TEXTS, one, "one.json")
    with pytest.raises(DataError, match=r"--beside one\.json: one was asked about other continuations"):
        require_same(TEXTS[:1], one, "one.json")


def test_only_single_texts_have_labels() -> None:
    with pytest.raises(DataError, match="--limit -1: at least 1"):
        read_continuations(Path("none.jsonl"), None, -1)
    for name in ("rewrite", "missing.txt", "nonsense"):
        with pytest.raises(DataError, match=f"--criteria {name}: "):
            questions(TEXTS, [name])
    with pytest.raises(DataError, match=r"--criteria quality: .* pointwise"):
        questions(TEXTS, ["quality"])


async def test_the_command_asks_each_criterion_about_each_continuation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prefix": f"p{i}", "suffix": "the original", "rollout": f"continuation {i}"} for i in range(5)]
    path = tmp_path / "prefixes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def answer(prompt: str) -> str:
        assert "continuation " in prompt
        label = DEFINITE if "continuation 3" in prompt else NO
        return f'{{"reasoning": "because", "label": "{label} Hallucination"}}'

    words = [
        "labels",
        str(path),
        "--criteria",
        *CRITERIA,
        "--candidate-field",
        "rollout",
        "--save",
        str(tmp_path / "new" / "a.json"),
    ]
    async with FakeJudge(answer=answer) as judge:
        client = ["--teacher-url", judge.url, "--teacher-api", "openai", "--teacher-name", "truth"]
        await asyncio.to_thread(main, [*words, *client])
        assert judge.requests == 10
        beside = ["--beside", str(tmp_path / "new" / "a.json")]
        await asyncio.to_thread(main, [*words[:-2], *client, "--limit", "5", *beside])
        asked = judge.requests
        (tmp_path / "other.json").write_text('{"model": "m", "all": {}, "failed": 0, "subsets": {}}')
        for wrong, told in (
            (["--limit", "3", *beside], "was asked about other continuations"),
            (["--beside", str(tmp_path / "other.json")], "it is not a report of `labels --save`, which has model"),
        ):
            with pytest.raises(SystemExit, match=told):
                await asyncio.to_thread(main, [*words, *client, *wrong])
        assert judge.requests == asked, "nothing is asked for what could not be compared"
    assert "4 (80.0%) | 0 (0.0%) | 1 (20.0%)" in (out := capsys.readouterr().out)
    assert "100.00% - 100.00% (100.00%)" in out
