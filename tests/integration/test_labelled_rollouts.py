"""From labelled records to scored rollouts with a real SGLang server: what is trained is what is asked later."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from training import steps, train
from transformers import AutoTokenizer

from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.experience.maker import answer_to
from megatron_sip.judge import ClientSettings, Endpoint, Judge, JudgeSettings, ScheduleSettings
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.labelled_tasks import LabelledSettings, make_writer
from megatron_sip.records import Candidate, Group, Judgement, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.serving.launch import LocalServer

SEED = 5
PREFIX = "The if statement is used for conditional execution. It selects exactly one of the suites by evaluating"
GOOD, BAD = " the expressions one by one until one is found to be true.", " one of one one by expressions be the is."


def records() -> list[dict[str, Any]]:
    both = {"criterion": "quality", "prefix": PREFIX, "suffix": GOOD, "pair": "p"}
    return [
        both | {"option_1": GOOD, "option_2": BAD, "verdict": "1"},
        both | {"option_1": BAD, "option_2": GOOD, "verdict": "2"},
        {"criterion": "safety", "prefix": PREFIX, "suffix": "", "candidate": GOOD, "verdict": "YES"},
        {"criterion": "safety", "prefix": PREFIX, "suffix": "", "candidate": BAD, "verdict": "NO"},
    ]


async def soft_values(server: LocalServer, folder: Path) -> dict[str, list[list[float]]]:
    """What the model gives as a judge, by its verdicts' probabilities: of the pair in both orders, of each text's safety."""
    client = ClientSettings((Endpoint(server.url),), str(folder), call_timeout_s=300.0, seed=SEED)
    settings = JudgeSettings(
        {"quality": 1.0, "safety": 1.0}, client, schedule=ScheduleSettings("all_pairs"), audit_rate=0.0
    )
    candidates = [Candidate("suffix", [1], GOOD), Candidate("rollout", [2], BAD)]
    async with Judge(settings) as judge:
        await judge.check()
        [judged] = await judge.score([Group(Task(0, [1], [1], PREFIX, GOOD), candidates)])
    return judged.verdicts


async def test_greedy_rollouts_of_judgements_are_the_judge_s_soft_verdicts(
    smollm2_server: LocalServer, smollm2_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "judgements.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    writer = make_writer(LabelledSettings("judgements", max_prompt=1500, max_answer=4, seed=SEED), tokenizer)
    source = LabelledSource(open_records([str(path)], "1", writer), "train", writer, SEED)
    tasks = [source.in_order(place) for place in range(len(source))]
    async with SGLangPool([smollm2_server.url]) as engines:
        answers = await engines.generate([task.prefix_ids for task in tasks], SamplingSettings(4, temperature=0.0))
    groups = []
    for task, completions in zip(tasks, answers, strict=True):
        assert isinstance(completions, list)
        assert task.label is not None
        groups.append(Group(task, [answer_to(tokenizer, task.label, completions[0])]))
    async with Judge(JudgeSettings({"label": 1.0}, None), policy=ChatEncoder(tokenizer)) as judge:
        judged = await judge.score(groups, objective="rf-nll")

    asked = await soft_values(smollm2_server, smollm2_dir)
    pair = {(first, second): value for first, second, value in asked["quality"]}
    first_wins = [pair[0, 1], pair[1, 0], asked["safety"][0][1], asked["safety"][1][1]]
    assert sum(map(is_clear, first_wins)) >= 2
    for group, value in zip(judged, first_wins, strict=True):
        label = group.task.label
        assert isinstance(label, Judgement)
        [[_, verdict]] = group.verdicts["label"]
        assert len(group.candidates[0].ids) == 1
        if is_clear(value):
            assert verdict == float(value > 0.5)
        right = float(label.verdict in ("1", "YES"))
        assert group.scores == [float(verdict == right)]


def is_clear(value: float) -> bool:
    """Whether a probability of option 1 is not within what the order of float32's sums may move."""
    return abs(value - 0.5) > 1e-3


PROMPT = """+++
name = "shorter"
kind = "pairwise"
pattern = 'ANSWER: ([12])'
start = "ANSWER: "
[values]
"1" = 1.0
"2" = 0.0
+++
{{prefix}}

{{option_1}}

{{option_2}}

Which option is shorter? ANSWER: 1 or ANSWER: 2.
"""
FUNCTION = """
def variety(texts, prefix, reference):
    assert "Which option is shorter?" in prefix and reference in "12"
    return [len(set(text)) / (1 + len(text)) for text in texts]
"""


@pytest.mark.slow
def test_a_run_trains_a_judge_by_labels_and_a_python_function_without_any_teacher(
    tiny_engine: LocalServer, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shorter.txt").write_text(PROMPT)
    (tmp_path / "functions_of_a_test.py").write_text(FUNCTION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    lines = []
    for number in range(8):
        texts = [" a word", " some more words of it"]
        for order, verdict in ((texts, "1"), (texts[::-1], "2")):
            options = {"option_1": order[0], "option_2": order[1], "verdict": verdict}
            record = {"criterion": str(tmp_path / "shorter.txt"), "prefix": f"Text {number}", "suffix": "", **options}
            lines.append(json.dumps(record | {"pair": str(number)}) + "\n")
    (tmp_path / "records.jsonl").write_text("".join(lines))
    run = tmp_path / "run"
    train(
        run,
        *("--hf-config", str(tiny_llama_dir), "--data-path", str(tmp_path / "records.jsonl"), "--split", "1"),
        *("--tasks", "judgements", "--judge-verdict", "hard", "--objective", "dpo", "--num-rollouts", "3"),
        *("--criteria", "label=1", "functions_of_a_test:variety=0.5", "--rollout-url", tiny_engine.url),
        *("--seq-length", "400", "--suffix-length", "6", "--row-length", "800", "--train-iters", "2"),
    )
    for record in steps(run):
        assert record["examples"] > 0
        assert record["spread/functions_of_a_test:variety"] > 0
        assert record["judge/label/no-verdict"] == 1.0  # made-up weights
        assert record["judge/label/accuracy/shorter"] == 0.0
        assert record["judge/verdicts/functions_of_a_test:variety"] > 0
        assert record["tasks/prompts-cut"] == 0
