"""A step's rounds of tasks together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.experience.maker import Experience
from megatron_sip.experience.rounds import FAILED_REWRITES, is_enough, is_representative, lost_groups, step_experience
from megatron_sip.metrics import Mean, Metrics, flatten
from megatron_sip.records import Branch, Example


def experience(first: int, count: int, seconds: float = 1.0, unrecorded: str | None = None) -> Experience:
    examples = [Example(first + i, [1], [Branch([2], "sampled", "rollout", advantage=1.0)]) for i in range(count)]
    return Experience(examples, {"calls": 3.0, "share": Mean(1.0, 2.0), "seconds/judge": seconds}, unrecorded)


def test_durations_of_leaders_run_side_by_side_and_of_rounds_in_turn() -> None:
    rounds = [[experience(0, 1, 2.0), experience(10, 0, 5.0)], [experience(20, 1, 1.0), experience(30, 3, 0.5)]]
    made = step_experience(rounds, 4, 2)
    assert [example.task_index for example in made.examples] == [0, 20, 30, 31]
    assert made.rounds == 2
    assert flatten(made.metrics) == {
        **{"calls": 12, "share": 0.5, "seconds/judge": 6.0},
        **{"grpo/rounds": 2, "grpo/surplus": 1},
    }


def test_without_oversampling_nothing_is_cut_or_logged() -> None:
    made = step_experience([[experience(0, 3, unrecorded="full"), experience(10, 2)]], 4, 1)
    assert len(made.examples) == 5  # a task may have given two
    assert made.unrecorded == ["full"]
    assert not [name for name in made.metrics if name.startswith("grpo/")]


@pytest.mark.parametrize(
    ("dropped", "representative"),
    [
        ({}, True),
        ({"judge-quality-timeout": 5.0}, True),
        ({"judge-quality-timeout": 3.0, "rollout timeout": 3.0}, False),
        ({"no spread": 9.0, "judge-quality-timeout": 1.0}, True),  # those are whole, and judged
        ({"no good candidate": 4.0, "lone rollout": 3.0, "fewer than two rollouts": 2.0, "no rewrite": 1.0}, True),
        ({"unscored": 3.0, "non-finite score": 3.0}, False),
        ({"tied": 4.0, "judge-quality-timeout": 6.0}, False),
        ({"no rewrite": 9.0, "rewriter/dropped/refused": 9.0}, True),  # an answer
        ({"no rewrite": 9.0, FAILED_REWRITES: 6.0}, False),
        ({"judge-quality-timeout": 4.0, FAILED_REWRITES: 4.0}, True),  # they may be the same groups
        ({FAILED_REWRITES: 6.0}, False),  # RF-NLL would learn the suffixes that are left
    ],
)
def test_a_step_of_which_more_than_half_is_lost_is_not_representative(
    dropped: dict[str, float], representative: bool
) -> None:
    metrics: Metrics = {
        "groups": 10.0,
        **{name if "/" in name else f"dropped/{name}": count for name, count in dropped.items()},
    }
    assert is_representative(metrics, 0.5) is representative
    assert is_representative(metrics, 0.0)
    assert is_representative(metrics, 1.0) is (lost_groups(metrics) == {})


@given(st.lists(st.integers(0, 4), min_size=9, max_size=9), st.integers(1, 5), st.integers(1, 8))
def test_rounds_end_with_a_full_batch_or_at_the_bound(counts: list[int], most: int, prompts: int) -> None:
    rounds: list[list[Experience]] = []
    while not is_enough(rounds, prompts, most):
        rounds.append([experience(0, counts[len(rounds)])])
    usable = [sum(counts[:number]) for number in range(len(rounds) + 1)]
    assert 1 <= len(rounds) <= most
    assert usable[len(rounds) - 1] < prompts
    assert len(rounds) == most or usable[-1] >= prompts
