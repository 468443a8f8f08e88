"""Which tasks a run has: labelled ones, or documents (tests of these are in test_set_up.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_run import FakeExchange
from flag_cases import unchecked_settings
from tiny_tokenizer import adding_bos, byte_level_tokenizer

from megatron_sip.errors import DataError
from megatron_sip.open_tasks import open_tasks

THOUGHT = {"prefix": "some words before a place", "suffix": " and after it", "start_mark": "<t>", "end_mark": "</t>"}


def test_labelled_records_are_opened_as_the_flags_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(THOUGHT | {"id": number}) + "\n" for number in range(50)))
    tokenizer = adding_bos(byte_level_tokenizer())
    flags = ("--tasks", "thoughts", "--suffix-length", "32", "--max-prompt-length", "80")
    settings = unchecked_settings(*flags, data_path=[str(path)], split="4,1", seq_length=128, global_batch_size=6)
    training, held_out = open_tasks(settings, tokenizer, FakeExchange())  # type: ignore[arg-type]
    assert held_out is None
    assert training is not None
    task = training.task(0)
    assert task.prefix_ids[0] == tokenizer.bos_token_id  # as a document of this tokenizer begins
    assert tokenizer.decode(task.prefix_ids, skip_special_tokens=True) == THOUGHT["prefix"] + "<t>"
    assert re.search(r"^tasks: records \d\d; epochs in this run 1\.\d$", capsys.readouterr().out, re.M)
    assert training.fingerprint() == open_tasks(settings, tokenizer, FakeExchange())[0].fingerprint()  # type: ignore


def test_what_happens_to_the_validation_s_records_is_not_counted_in_a_step(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [THOUGHT | {"prefix": "w " * 100, "split": "valid"}, THOUGHT | {"prefix": "words ", "split": "train"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--tasks", "thoughts", "--max-prompt-length", "60")
    settings = unchecked_settings(*flags, data_path=[str(path)], seq_length=256, eval_interval=5)
    training, held_out = open_tasks(settings, byte_level_tokenizer(), FakeExchange())  # type: ignore[arg-type]
    assert training is not None
    assert held_out is not None
    held_out.tasks(0, 1)
    training.tasks(0, 1)
    assert not training.take_counts().get("tasks/prompts-cut")
    assert held_out.take_counts() == {"tasks/prompts-cut": 1.0}


def test_a_wrong_record_ends_the_run_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(THOUGHT) + "\n" + json.dumps(THOUGHT | {"end_mark": ""}) + "\n")
    settings = unchecked_settings("--tasks", "thoughts", data_path=[str(path)], seq_length=512)
    with pytest.raises(DataError, match=r'a\.jsonl:2: "end_mark" is empty'):
        open_tasks(settings, byte_level_tokenizer(), FakeExchange())  # type: ignore[arg-type]


def test_a_verdict_mode_of_a_criterion_that_no_record_has_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}\n"
    path = tmp_path / "a.jsonl"
    record = {"criterion": "safety", "verdict": "NO", "prefix": "words", "candidate": " bites"}
    path.write_text("".join(json.dumps(record | {"id": number}) + "\n" for number in range(9)))
    flags = ("--tasks", "judgements", "--judge-verdict", "soft")
    given = {"data_path": [str(path)], "seq_length": 4096, "split": "1"}
    message = "--judge-verdict of saftey: no record has such a criterion; there are: safety"
    with pytest.raises(DataError, match=message):
        open_tasks(unchecked_settings(*flags, "saftey=hard", **given), tokenizer, FakeExchange())  # type: ignore[arg-type]
    training, _ = open_tasks(unchecked_settings(*flags, "safety=hard", **given), tokenizer, FakeExchange())  # type: ignore
    assert training is not None
