"""Metrics of thoughts: length up to the end mark in the policy's tokens, share that ends, reward."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.experience.thinking import thought_metrics, tokens_through
from megatron_sip.metrics import flatten, merge
from megatron_sip.records import Candidate, Group, Task, Thinking

BYTES = byte_level_tokenizer()
MARK = "</think>"


def group(texts: list[str], scores: list[float] | None = None, dropped: str | None = None) -> Group:
    rollouts = [Candidate("rollout", BYTES.encode(text), text) for text in texts]
    return Group(Task(0, [1], [], "", "", Thinking(MARK, "maths")), rollouts, scores, dropped=dropped)


def metrics(*groups: Group) -> dict[str, float]:
    return flatten(thought_metrics(groups, BYTES.decode))


def test_by_hand() -> None:
    found = metrics(
        group([f"ab{MARK} so", "never", f"{MARK}"], [1.0, 0.0, 0.5]),
        group([f"é色{MARK}{MARK}"], [0.0]),
        group([f"lost{MARK}"], None, dropped="judge timed out"),
    )
    ended = [f"ab{MARK}", MARK, f"é色{MARK}", f"lost{MARK}"]
    assert found["thought/length"] == pytest.approx(sum(len(BYTES.encode(text)) for text in ended) / 4)
    assert found["thought/ended"] == 4 / 5
    assert found["thought/reward"] == (1.0 + 0.0 + 0.5 + 0.0) / 4


def test_other_tasks_and_other_candidates_have_none() -> None:
    thinking = group([f"x{MARK}"], [1.0])
    plain = dataclasses.replace(thinking, task=dataclasses.replace(thinking.task, label=None))
    assert thought_metrics([plain], BYTES.decode) == {}
    suffix = Candidate("suffix", [1], MARK)
    assert metrics(dataclasses.replace(thinking, candidates=[suffix])) == {}


def test_they_add_over_ranks() -> None:
    groups = [group([f"ab{MARK}"], [1.0]), group(["never", f"{MARK}"], [0.0, 1.0])]
    apart = merge([thought_metrics([each], BYTES.decode) for each in groups])
    assert flatten(apart) == metrics(*groups)


@pytest.mark.parametrize("tokenizer", [BYTES, metaspace_tokenizer()])
@given(before=st.text(max_size=20), after=st.text(max_size=20))
def test_the_tokens_of_a_thought_are_the_fewest_that_hold_its_end(tokenizer, before: str, after: str) -> None:
    ids = tokenizer.encode(before + MARK + after, add_special_tokens=False)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    if MARK not in decode(ids):
        return  # a character that this tokenizer does not know
    count = tokens_through(MARK, ids, decode)
    assert MARK in decode(ids[:count])
    assert MARK not in decode(ids[: count - 1])


def test_a_mark_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not in the text of these 1 tokens"):
        tokens_through(MARK, [5], BYTES.decode)
