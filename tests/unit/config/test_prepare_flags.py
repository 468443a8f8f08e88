"""What the commands of `prepare` are told by their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sip.config.judge_flags import add_accuracy_flags, add_labels_flags
from megatron_sip.config.prepare_flags import (
    add_judgements_flags,
    add_rewrites_flags,
    judgements_work,
    rewrites_work,
)
from megatron_sip.config.thoughts_flags import add_thoughts_flags
from megatron_sip.errors import DataError
from megatron_sip.prepare.__main__ import command_line

AddFlags = Callable[[argparse.ArgumentParser], None]


def parser_of(add: AddFlags) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add(parser)
    return parser


@pytest.mark.parametrize(
    ("add", "longest"),
    [
        (add_thoughts_flags, "think_max_tokens"),
        (add_judgements_flags, "corrupt_max_tokens"),
        (add_judgements_flags, "judge_max_tokens"),
        (add_rewrites_flags, "judge_max_tokens"),
        (add_accuracy_flags, "judge_max_tokens"),
        (add_labels_flags, "judge_max_tokens"),
    ],
)
def test_a_busy_server_has_the_time_for_the_longest_answer(add: AddFlags, longest: str) -> None:
    """At 5 tokens a second, as a full server gives to each of many answers."""
    parser = parser_of(add)
    assert parser.get_default("teacher_timeout") >= parser.get_default(longest) / 5
    assert parser.get_default("teacher_timeout") >= 600


QUALITY = ("judgements", "--task", "quality", "--out", "o")
SAFETY = ("judgements", "--task", "safety", "--out", "o")
REWRITES = ("rewrites", "--out", "o")
TEACHER = ("--teacher-url", "http://host:1")
LABELLED = ("--no-cut", "--label-field", "toxic")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((*QUALITY, "--from-groups", "g", "--data-path", "d"), "--data-path"),
        ((*QUALITY, "--from-groups", "g", "--max-documents", "3", "--role", "policy"), "--role, --max-documents"),
        ((*QUALITY, "--from-groups", "g", "--role-shares", "1,1,1"), "--role-shares"),
        (
            (*SAFETY, "--from-groups", "g", "--criterion", "factuality", "--corrupt", "shuffle"),
            "--corrupt, --criterion",
        ),
        ((*QUALITY, "--from-groups", "g", "--suffix-length", "9", "--no-cut"), "--no-cut, --suffix-length"),
        ((*QUALITY, "--from-groups", "g", "--label-field", "x"), "--label-field"),
        ((*QUALITY, "--from-groups", "g", "--votes", "3"), "--votes"),
        ((*QUALITY, "--from-groups", "g", "--unbalanced"), "--unbalanced"),
        ((*SAFETY, "--from-groups", "g", "--one-order"), "--one-order"),
        (
            (*QUALITY, *TEACHER, "--votes", "3", "--unbalanced", "--label-field", "x"),
            "--label-field, --votes, --unbalanced",
        ),
        ((*QUALITY, *TEACHER, "--judge-temperature", "0"), "--judge-temperature"),
        ((*QUALITY, *TEACHER, "--agreement", "0.8"), "--agreement"),
        ((*QUALITY, *TEACHER, "--corrupt", "shuffle"), "--teacher-url"),
        ((*QUALITY, "--corrupt", "shuffle", "--corrupt-top-p", "0.9"), "--corrupt-top-p"),
        ((*QUALITY, "--corrupt", "shuffle", "--no-cut", "--tokenizer", "t"), "--tokenizer"),
        ((*SAFETY, *TEACHER, "--corrupt", "shuffle", "--criterion", "safety"), "--corrupt, --criterion"),
        ((*SAFETY, *TEACHER, "--safe-labels", "no"), "--safe-labels"),
        ((*SAFETY, *LABELLED, "--votes", "3", *TEACHER), "--votes, --teacher-url"),
        ((*SAFETY, *TEACHER, "--no-cut", "--seq-length", "9"), "--seq-length"),
        ((*REWRITES, *LABELLED, "--votes", "3"), "--votes"),
        ((*REWRITES, *TEACHER, "--tokenizer", "t", "--rewrite-prompt", "p.txt"), "--rewrite-prompt"),
    ],
)
def test_flags_that_would_do_nothing_are_named(words: tuple[str, ...], named: str) -> None:
    given = command_line().parse_args(words)
    work = rewrites_work if given.command == "rewrites" else judgements_work
    with pytest.raises(DataError, match=f"^{named}: of no effect with"):
        work(given)


@pytest.mark.parametrize(
    "words",
    [
        (*QUALITY, "--corrupt", "shuffle", "--no-cut", "--seed", "5"),
        (*QUALITY, *TEACHER, "--tokenizer", "t", "--corrupt-top-p", "0.9", "--corrupt", "teacher", "repeat"),
        (*QUALITY, *TEACHER, "--prefix-field", "p", "--tokenizer", "t"),
        (*SAFETY, *TEACHER, "--hf-config", "t", "--votes", "3", "--judge-top-p", "0.9", "--suffix-length", "9"),
        (*SAFETY, *LABELLED, "--safe-labels", "no", "--unsafe-labels", "yes", "--unbalanced"),
        (*REWRITES, *LABELLED, "--balance"),
    ],
)
def test_flags_that_do_something_are_taken(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("")
    given = command_line().parse_args([*words, "--data-path", str(tmp_path / "d.jsonl")])
    work = rewrites_work if given.command == "rewrites" else judgements_work
    assert work(given)


@pytest.mark.parametrize("add", [add_judgements_flags, add_thoughts_flags, add_accuracy_flags, add_labels_flags])
def test_who_rewrites_nothing_has_no_flag_for_it(add: AddFlags) -> None:
    assert not [name for name in parser_of(add)._option_string_actions if name.startswith("--rewrite")]
