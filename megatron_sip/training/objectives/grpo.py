"""GRPO on groups of branches that carry their advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sip.model.packing import PackedRow
from megatron_sip.training.objectives.settings import GrpoAverage, ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

METRIC_COUNTS = {"policy_loss": "grpo_count", "kl_penalty": "grpo_count", "clipped_fraction": "policy_tokens"}
MAX_LOG_RATIO = 20.0
"""exp of a larger one overflows sooner or later, and then a clipped token's gradient is 0 times infinity."""


def grpo(
    token_logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    branch_tokens: Tensor,
    weights: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    average: GrpoAverage = "sequence",
) -> LossTerms:
    """Group relative policy optimisation: clipped policy gradient with a KL penalty (Shao et al. 2024, eq. 3 and 4).

    Token loss: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef (exp(d) - d - 1), with
    r = exp(log-prob - old) and d = reference - log-prob, both exponents kept below MAX_LOG_RATIO.

    Args:
        token_logprobs, old_logprobs, reference_logprobs: [L]; the last may be None when kl_coef is 0.
        advantages, branch_tokens, weights: [B]; the branch's advantage, already normalised over its group, its length
            (they sum to L) and the weight of its loss.
    """
    token_advantages = advantages.repeat_interleave(branch_tokens)
    ratio = _bounded(token_logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = -torch.minimum(ratio * token_advantages, clipped * token_advantages)
    if kl_coef == 0:
        penalty = torch.zeros_like(policy)
    elif reference_logprobs is None:
        raise ValueError(f"kl_coef is {kl_coef}: GRPO needs the reference model's token log-probs")
    else:
        distance = _bounded(reference_logprobs.detach() - token_logprobs)
        penalty = distance.exp() - distance - 1
    tokens, branches = token_logprobs.numel(), branch_tokens.numel()
    share = 1.0 / branch_tokens.to(policy.dtype) if average == "sequence" else torch.ones_like(weights)
    share = share.repeat_interleave(branch_tokens)
    count = branches if average == "sequence" else tokens
    was_clipped = (clipped * token_advantages < ratio * token_advantages).detach()
    metrics: dict[str, Tensor | float] = {
        "grpo_count": count,
        "policy_loss": (policy * share).detach().sum(),
        "kl_penalty": (penalty * share).detach().sum(),
        "clipped_fraction": was_clipped.sum(),
        "policy_tokens": tokens,
    }
    losses = (policy + kl_coef * penalty) * share * weights.repeat_interleave(branch_tokens)
    return LossTerms(losses.sum(), count, metrics)


def grpo_row(
    settings: ObjectiveSettings,
    row: PackedRow,
    token_logprobs: Tensor,
    reference_token_logprobs: Tensor | None,
    old_token_logprobs: Tensor,
) -> LossTerms:
    """`grpo` of a row's branches; ValueError when one has no advantage."""
    advantages = [branch.advantage for branch in row.branches]
    if None in advantages:
        raise ValueError("grpo needs the advantage of every branch")
    lengths = [len(branch.ids) for branch in row.branches]
    return grpo(
        token_logprobs,
        old_token_logprobs,
        reference_token_logprobs,
        token_logprobs.new_tensor(advantages),
        torch.tensor(lengths, dtype=torch.int64, device=token_logprobs.device),
        token_logprobs.new_tensor([example.weight for example in row.examples for _ in example.branches]),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_coef=settings.kl_coef,
        average=settings.grpo_average,
    )


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO)
