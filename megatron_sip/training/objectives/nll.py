"""SFT, and RF-NLL, which differs from it in what the target is."""

from __future__ import annotations

from torch import Tensor

from megatron_sip.model.packing import PackedRow
from megatron_sip.training.objectives.terms import LossTerms

METRIC_COUNTS = {"nll": "target_tokens"}


def nll_row(row: PackedRow, token_logprobs: Tensor) -> LossTerms:
    """Negative log-likelihood of a row's targets: SFT, and RF-NLL when the target is the judge's best candidate.

    token_logprobs: [L]; count = L. Raises ValueError unless all branches are targets.
    """
    for example in row.examples:
        for branch in example.branches:
            if branch.role != "target":
                raise ValueError(
                    f"task {example.task_index}: an NLL objective trains branches of role target, got {branch.role}"
                )
    total, count = -token_logprobs.sum(), token_logprobs.numel()
    return LossTerms(total, count, {"nll": total.detach(), "target_tokens": count})
