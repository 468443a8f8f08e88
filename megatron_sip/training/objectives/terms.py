"""What every objective gives: a sum, a count and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What adds up over rows and ranks.

    sum: scalar, differentiable, to be divided by the global count.
    count: pairs (dpo), predicted tokens (sft, rf-nll, grpo by token) or branches (grpo otherwise).
    metrics: detached sums and their counts, see row_loss.METRIC_COUNTS.
    """

    sum: Tensor
    count: int
    metrics: dict[str, Tensor | float]
