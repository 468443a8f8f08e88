"""What other trainers are given is what our own trains on: the same records in the same words, with the same right answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prepare_cases import read_lines, run, write_documents, write_records
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.judge.labelled_tasks import LabelledKind, LabelledSettings, make_writer
from megatron_sip.prepare.formats import regex_of
from megatron_sip.records import Judgement, Rewriting

SEED = 11
FORMATS = ("--format", "sip", "verl", "nemo-gym", "--seed", str(SEED), "--split", "1", "--no-cut")
TEMPLATE = "{% for m in messages %}<|bos|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tasks(path: Path, kind: LabelledKind, prompt: Path | None = None) -> list[Any]:
    """Every record as our own trainer's task, in the order of the file."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    writer = make_writer(LabelledSettings(kind, 4000, 64, seed=SEED, rewrite_prompt=prompt), tokenizer)
    source = LabelledSource(open_records([str(path)], "1", writer), "train", writer, seed=1)
    return [source.in_order(place) for place in range(len(source))]


@pytest.fixture
def judgements(tmp_path: Path) -> Path:
    data = write_documents(tmp_path / "reports.jsonl", 12)
    words = ("judgements", "--task", "quality", "--data-path", data, "--corrupt", "shuffle", "--role-shares", "0,1,0")
    run(*words, "--out", tmp_path / "out", *FORMATS)
    return tmp_path / "out"


def test_judgements_are_asked_alike_everywhere(judgements: Path) -> None:
    rows = pq.read_table(judgements / "verl" / "train.parquet").to_pylist()
    lines = read_lines(judgements / "nemo-gym" / "train.jsonl")
    made = tasks(judgements / "judgements.jsonl", "judgements")
    assert len(made) == len(rows) == len(lines) == 24
    for task, row, line in zip(made, rows, lines, strict=True):
        assert isinstance(task.label, Judgement)
        assert (
            row["prompt"] == line["responses_create_params"]["input"] == [{"role": "user", "content": task.prefix_text}]
        )
        assert row["reward_model"] == {"style": "rule", "ground_truth": task.label.verdict}
        assert line["expected_answer"] == task.label.verdict
        assert row["extra_info"]["subset"] == line["metadata"]["subset"] == task.label.subset == "reports/shuffle"
        assert row["extra_info"]["pair"] == task.label.pair


@pytest.mark.parametrize("pattern", ["grade: (A|B)", "(?m)^grade: (A|B)$"])
def test_a_regex_finds_what_the_judge_s_own_pattern_finds(pattern: str) -> None:
    found = re.compile(regex_of(re.compile(pattern, re.IGNORECASE))).findall("Grade: B\nso\ngrade: a")
    assert found == re.compile(pattern, re.IGNORECASE).findall("Grade: B\nso\ngrade: a") == ["B", "a"]


@pytest.mark.parametrize("own", [False, True])
def test_rewrites_are_asked_alike_everywhere(tmp_path: Path, own: bool) -> None:
    path = tmp_path / "own.txt"
    path.write_text('+++\nname = "mine"\nkind = "text"\n+++\nSay it in rhyme, from {{first_words}}: {{continuation}}\n')
    prompt = ("--rewrite-prompt", path) if own else ()
    rows = [
        {"before": f"The harbour of town {i} is", "after": f" closed in winter {i}.", "ok": i % 3 == 0}
        for i in range(9)
    ]
    data = write_records(tmp_path / "cut.jsonl", rows)
    fields = ("--text-field", "after", "--prefix-field", "before", "--label-field", "ok")
    words = ("rewrites", "--data-path", data, *fields, "--role-shares", "0,0,1", *FORMATS, *prompt)
    run(*words, "--out", tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "verl" / "train.parquet").to_pylist()
    lines = read_lines(tmp_path / "out" / "nemo-gym" / "train.jsonl")
    made = tasks(tmp_path / "out" / "rewrites.jsonl", "rewrites", path if own else None)
    assert len(made) == len(table) == 9
    decode = byte_level_tokenizer().decode
    for task, row, line in zip(made, table, lines, strict=True):
        assert isinstance(task.label, Rewriting)
        [message] = row["prompt"]
        assert line["responses_create_params"]["input"] == [message]
        assert message["content"] in decode(task.prefix_ids)
        assert ("Say it in rhyme" in message["content"]) == own
        assert row["extra_info"]["safe"] == line["metadata"]["safe"] == task.label.safe
        assert row["reward_model"]["style"] == ("rule" if task.label.safe else "model")
        assert row["reward_model"]["ground_truth"] == task.suffix_text
