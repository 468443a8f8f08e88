"""SFT, and RF-NLL, which differs from it in what the target is."""

from __future__ import annotations

from torch import Tensor

from megatron_sip.model.packing import PackedRow
from megatron_sip.training.objectives.terms import LossTerms

METRIC_COUNTS = {"nll": "target_tokens"}


def nll(token_logprobs: Tensor, token_weights: Tensor) -> LossTerms:
    """Negative log-likelihood of the targets: SFT, and RF-NLL when the target is the judge's best candidate.

    token_logprobs, token_weights: [L]. sum = -sum(weight * log-prob), count = L.
    """
    values = -token_logprobs
    count = token_logprobs.numel()
    return LossTerms((values * token_weights).sum(), count, {"nll": values.detach().sum(), "target_tokens": count})


def nll_row(row: PackedRow, token_logprobs: Tensor) -> LossTerms:
    """`nll` of a row's branches; ValueError unless all of them are targets."""
    for example in row.examples:
        for branch in example.branches:
            if branch.role != "target":
                raise ValueError(
                    f"task {example.task_index}: an NLL objective trains branches of role target, got {branch.role}"
                )
    weights = row.facts.weights.to(token_logprobs.dtype)
    return nll(token_logprobs, weights.repeat_interleave(row.branch_offsets.diff(), output_size=token_logprobs.numel()))
