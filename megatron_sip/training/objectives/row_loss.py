"""The loss of one packed row under any objective, and its metrics. Pure functions of log-probs, in any float dtype.

A model turns a packed row into one log-prob per predicted token; `row_loss` turns those into a sum, a count and metrics. Sums
and counts add up over rows, micro-batches and ranks: the trainer divides the summed loss by the global count, so the result
does not depend on how examples were packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sip.metrics import Mean, Metrics, merge
from megatron_sip.model.packing import PackedRow
from megatron_sip.training.objectives import dpo, grpo, mismatch, nll
from megatron_sip.training.objectives.settings import ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

METRIC_COUNTS = {
    **nll.METRIC_COUNTS,
    **dpo.METRIC_COUNTS,
    **grpo.METRIC_COUNTS,
    **mismatch.METRIC_COUNTS,
    "rollout_logratio": "rollout_tokens",
}
"""Every metric is a sum over what is trained on; this names the metric that holds its count."""


def row_loss(
    settings: ObjectiveSettings,
    row: PackedRow,
    token_logprobs: Tensor,
    reference_token_logprobs: Tensor | None = None,
    old_token_logprobs: Tensor | None = None,
) -> LossTerms:
    """The loss of one packed row; a filler row gives a zero that still carries gradient, and the same metrics.

    Args:
        token_logprobs, reference_token_logprobs, old_token_logprobs: [L]. The reference is needed when
            settings.needs_reference, and otherwise only feeds a metric; old ones are for GRPO, and without them the data
            counts as drawn from the present policy.

    Raises:
        ValueError: an input the objective needs is missing, has another length, or an example's roles do not fit.
    """
    for name, tensor in (
        ("token_logprobs", token_logprobs),
        ("reference_token_logprobs", reference_token_logprobs),
        ("old_token_logprobs", old_token_logprobs),
    ):
        if tensor is not None and tensor.shape != row.targets.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the row needs {tuple(row.targets.shape)}")
    if settings.objective == "dpo":
        terms = dpo.dpo_row(settings, row, token_logprobs, reference_token_logprobs)
    elif settings.objective == "grpo":
        old = token_logprobs if old_token_logprobs is None else old_token_logprobs
        terms = grpo.grpo_row(settings, row, token_logprobs, reference_token_logprobs, old)
    else:
        terms = nll.nll_row(row, token_logprobs)
    own = token_logprobs.detach()
    metrics = terms.metrics | mismatch.engine_difference(row.facts, own)
    if reference_token_logprobs is not None:
        metrics |= _rollout_logratio(row, own - reference_token_logprobs.detach())
    return LossTerms(terms.sum, terms.count, metrics)


def loss_metrics(rows: Sequence[LossTerms]) -> Metrics:
    """The loss and the metrics of all rows as numbers that add up, fetched from the device in one copy."""
    tensors = [value for terms in rows for value in (terms.sum, *terms.metrics.values()) if isinstance(value, Tensor)]
    numbers = iter(torch.stack([tensor.detach().double() for tensor in tensors]).tolist() if tensors else ())

    def number(value: Tensor | float) -> float:
        return next(numbers) if isinstance(value, Tensor) else float(value)

    parts: list[Metrics] = []
    for terms in rows:
        loss = Mean(number(terms.sum), float(terms.count))
        plain = {name: number(value) for name, value in terms.metrics.items()}
        counts: Metrics = {name: value for name, value in plain.items() if name not in METRIC_COUNTS}
        means = {
            name: Mean(value, plain[METRIC_COUNTS[name]]) for name, value in plain.items() if name in METRIC_COUNTS
        }
        parts.append({"loss": loss, **counts, **means})
    return merge(parts)


def _rollout_logratio(row: PackedRow, logratio: Tensor) -> dict[str, Tensor | float]:
    """Sum of policy minus reference log-prob, `logratio` [L], over the tokens of the rollouts that are trained on.

    Exact for those, and a sign of drift. It estimates KL(policy || reference) only where every rollout of the present policy
    is trained on, as in GRPO: DPO's are the best and the worst, and what was learnt from such ones sets its sign. The
    others' reference log-probs would cost a forward pass over all of them.
    """
    entries = row.facts.rollout_entries
    return {"rollout_logratio": logratio[entries].sum(), "rollout_tokens": entries.numel()}
