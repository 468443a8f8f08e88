"""What a checkpoint keeps of experience that was made ahead is what was made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.experience.ahead import made_for, pack, unpack
from megatron_sip.experience.control import Control
from megatron_sip.experience.rounds import StepExperience
from megatron_sip.experience.selection import SelectionSettings
from megatron_sip.metrics import Mean
from megatron_sip.records import Branch, Example

NUMBERS = st.floats(allow_nan=False)
IDS = st.lists(st.integers(0, 200_000), max_size=4)
BRANCHES = IDS.flatmap(
    lambda ids: st.builds(
        Branch,
        ids=st.just(ids),
        role=st.sampled_from(["chosen", "rejected", "target", "sampled"]),
        kind=st.sampled_from(["suffix", "rewrite", "rollout"]),
        advantage=st.none() | NUMBERS,
        engine_logprobs=st.none() | st.lists(NUMBERS, min_size=len(ids), max_size=len(ids)),
    )
)
EXAMPLES = st.builds(Example, st.integers(0), IDS, st.lists(BRANCHES, max_size=3), st.integers(0, 9))
METRICS = st.dictionaries(st.text(), NUMBERS | st.builds(Mean, NUMBERS, NUMBERS))
MADE = st.builds(StepExperience, st.lists(EXAMPLES, max_size=3), METRICS, st.integers(1, 4), st.just([]))
PURPOSE = made_for(SelectionSettings(), 4, 1)


@given(MADE)
def test_it_comes_back_number_for_number(made: StepExperience) -> None:
    assert unpack(pack(made, PURPOSE), PURPOSE) == made


def test_a_run_that_learns_otherwise_does_not_get_it() -> None:
    kept = pack(StepExperience([], {}, 1, []), PURPOSE)
    settings = SelectionSettings()
    others = [
        (SelectionSettings("grpo", candidates=("rollout",)), 4, 1),
        (SelectionSettings("rf-nll", control=Control.of("safety", None, 0.5)), 4, 1),
        (replace(settings, seed=5), 4, 1),
        (settings, 8, 1),
        (settings, 4, 2),
    ]
    assert [unpack(kept, made_for(*other)) for other in others] == [None] * len(others)


@dataclass
class OtherBranch:
    """As another version of the program has it: log-probs under another name."""

    ids: list[int]
    role: str
    logprobs: list[float] | None = None


def test_a_program_whose_records_have_other_fields_does_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = StepExperience([Example(0, [1], [Branch([2], "chosen", "suffix")])], {}, 1, [])
    kept = pack(made, PURPOSE)
    monkeypatch.setattr("megatron_sip.experience.ahead.Branch", OtherBranch)
    assert unpack(kept, made_for(SelectionSettings(), 4, 1)) is None
