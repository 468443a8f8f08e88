"""From which step on, and up to which, a kind of candidate takes part."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.experience.kind_steps import ALWAYS, KindSteps
from megatron_sip.records import CANDIDATE_KINDS


def test_rollouts_come_and_suffix_and_rewrite_go() -> None:
    steps = KindSteps(rollout_start=2, suffix_end=3, rewrite_end=5)
    assert [steps.at(CANDIDATE_KINDS, step) for step in range(6)] == [
        ("suffix", "rewrite"),
        ("suffix", "rewrite"),
        ("suffix", "rewrite", "rollout"),
        ("rewrite", "rollout"),
        ("rewrite", "rollout"),
        ("rollout",),
    ]
    assert steps.phases() == [0, 2, 3, 5]
    assert steps.at(("suffix",), 0) == ("suffix",)


def test_without_flags_all_kinds_stay() -> None:
    assert ALWAYS.phases() == [0]
    assert ALWAYS.at(CANDIDATE_KINDS, 10**9) == CANDIDATE_KINDS


@given(st.integers(0, 9), st.none() | st.integers(1, 9), st.none() | st.integers(1, 9), st.integers(0, 12))
def test_kinds_change_only_where_a_phase_begins(start: int, suffix: int | None, rewrite: int | None, step: int) -> None:
    steps = KindSteps(start, suffix, rewrite)
    begun = max(first for first in steps.phases() if first <= step)
    assert steps.at(CANDIDATE_KINDS, step) == steps.at(CANDIDATE_KINDS, begun)
