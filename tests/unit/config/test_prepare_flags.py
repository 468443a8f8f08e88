"""What the commands of `prepare` are told by their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from megatron_sip.config.judge_flags import add_accuracy_flags, add_labels_flags
from megatron_sip.config.prepare_flags import add_judgements_flags, add_rewrites_flags
from megatron_sip.config.thoughts_flags import add_thoughts_flags

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
