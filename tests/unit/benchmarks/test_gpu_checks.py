"""The GPU day's check of a step finds what it is there for: wrong positions, a mask with a hole."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sip.records import Example

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def packed(mask_of_second: bool, step: int) -> Any:
    """Log-probs by rows [prefix | first | second]; whether the second branch is kept from the first, and positions' step."""

    def logprobs(model: Any, examples: Sequence[Example]) -> Tensor:
        sums = []
        for example in examples:
            prefix, (first, second) = len(example.prefix_ids), (branch.ids for branch in example.branches)
            ids = torch.tensor(example.prefix_ids + first + second)
            visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            end = prefix + len(first)
            if mask_of_second:
                visible[end:, prefix:end] = False
            positions = step * torch.cat([torch.arange(end), prefix + torch.arange(len(second))])
            mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
            logits = model(ids[None], attention_mask=mask[None, None], position_ids=positions[None]).logits[0]
            found = logits.log_softmax(-1)
            for start, branch in ((prefix, first), (end, second)):
                rows = torch.tensor([prefix - 1, *range(start, start + len(branch) - 1)])
                sums.append(found[rows, torch.tensor(branch)].sum())
        return torch.stack(sums).view(-1, 2)

    return logprobs


@pytest.mark.parametrize(("kept_apart", "step", "right"), [(True, 1, True), (True, 0, False), (False, 1, False)])
def test_a_step_without_positions_or_with_branches_that_see_each_other_is_above_the_bound(
    kept_apart: bool, step: int, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    checks = importlib.import_module("gpu_checks")
    policy, reference = checks.policy_and_reference()
    examples = checks.random_examples(checks.TINY, checks.SHAPE.vocab_size)
    exact = checks.exact_step(policy, reference, examples)
    errors = checks.step_errors(checks.exact_step(policy, reference, examples, packed(kept_apart, step)), exact)
    if right:
        assert max(errors.values()) < 1e-6
    else:
        assert max(errors.values()) > 2 * checks.RELATIVE[torch.bfloat16]
