"""What the engine thought of the tokens it sampled, against what the trainer thinks of them at the same weights.

Both compute the same model by other kernels and in other number formats, so that a rollout is not quite the policy's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sip.model.packing import BranchFacts
from megatron_sip.training.objectives.settings import MismatchCorrection

METRIC_COUNTS = {
    "engine_logprob_abs_diff": "engine_tokens",
    "grpo/engine_ratio": "engine_tokens",
    "grpo/engine_logratio": "engine_tokens",
    "grpo/corrected_share": "engine_tokens",
}
TRUNCATED_AT = 2.0
MASKED_BELOW, MASKED_ABOVE = 0.5, 5.0
MAX_LOG_RATIO = 20.0
"""exp of a larger one overflows sooner or later."""


def engine_difference(facts: BranchFacts, token_logprobs: Tensor) -> dict[str, Tensor | float]:
    """Sum of |log-prob here - log-prob in the engine|, both [L], over the tokens whose engine log-prob is known."""
    gaps = (token_logprobs - facts.engine_logprobs.to(token_logprobs.dtype))[facts.engine_entries]
    return {"engine_logprob_abs_diff": gaps.abs().sum(), "engine_tokens": gaps.numel()}


def correction(
    mode: MismatchCorrection, engine: Tensor, entries: Tensor, token_logprobs: Tensor
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """What each token's policy gradient is multiplied by, [L], for having been sampled by the engine; and metrics.

    With c = exp(trainer's log-prob - engine's), both [L] and without gradient:
      truncate: min(c, TRUNCATED_AT), truncated importance sampling (Yao et al. 2025);
      mask: c, and 0 outside [MASKED_BELOW, MASKED_ABOVE] (IcePop, Ling team 2025, equation for M(k));
      none: 1, as for every token whose engine log-prob is not known (NaN; int64 `entries` [K] are those that are).

    Metrics, of any mode: sums of c and of its logarithm, and how many tokens were truncated or masked.
    """
    known = ~engine.isnan()
    gaps = torch.where(known, token_logprobs.detach() - engine, 0.0)
    ratios = gaps.clamp(max=MAX_LOG_RATIO).exp()
    changed = torch.zeros_like(known)
    weights = torch.ones_like(ratios)
    if mode == "truncate":
        changed, weights = ratios > TRUNCATED_AT, ratios.clamp(max=TRUNCATED_AT)
    elif mode == "mask":
        changed = (ratios < MASKED_BELOW) | (ratios > MASKED_ABOVE)
        weights = ratios.masked_fill(changed, 0.0)
    metrics: dict[str, Tensor | float] = {
        "grpo/engine_ratio": ratios[entries].sum(),
        "grpo/engine_logratio": gaps.sum(),
        "grpo/corrected_share": changed.sum(),
    }
    return weights, metrics
