"""GRPO on groups of branches that carry their advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sip.model.packing import PackedRow
from megatron_sip.training.objectives.mismatch import MAX_LOG_RATIO, correction
from megatron_sip.training.objectives.settings import ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

METRIC_COUNTS = {"grpo/clipped_fraction": "grpo/tokens", "grpo/kl": "grpo/tokens", "grpo/sampled_nll": "grpo/tokens"}


def grpo(
    settings: ObjectiveSettings,
    token_logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    corrections: Tensor,
    advantages: Tensor,
    branch_tokens: Tensor,
) -> LossTerms:
    """Group relative policy optimisation: clipped policy gradient with a KL penalty (Shao et al. 2024, eq. 3 and 4).

    Token loss: -c min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef (exp(d) - d - 1), with c the correction,
    r = exp(log-prob - old) and d = reference - log-prob, both exponents kept below MAX_LOG_RATIO.

    Args:
        token_logprobs, old_logprobs, reference_logprobs, corrections: [L]; the reference may be None when kl_coef is 0.
        advantages, branch_tokens: [B]; a branch's advantage in its group and its length (they sum to L).

    Metrics: grpo/kl is the penalty's mean over tokens, an estimate of KL(policy || reference). grpo/sampled_nll is the mean
    of -log-prob over the sampled tokens: an estimate of the policy's entropy, without bias, only where they were sampled at
    temperature 1 and top-p 1, and below it at lower ones.
    """
    tokens, branches = token_logprobs.numel(), branch_tokens.numel()
    token_advantages = advantages.repeat_interleave(branch_tokens, output_size=tokens)
    ratio = _bounded(token_logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    losses = -torch.minimum(ratio * token_advantages, clipped * token_advantages) * corrections
    was_clipped = (clipped * token_advantages < ratio * token_advantages).detach()
    metrics: dict[str, Tensor | float] = {
        "grpo/tokens": tokens,
        "grpo/branches": branches,
        "grpo/clipped_fraction": was_clipped.sum(),
        "grpo/sampled_nll": -token_logprobs.detach().sum(),
    }
    if settings.kl_coef > 0:
        if reference_logprobs is None:
            raise ValueError(f"--grpo-kl-coef is {settings.kl_coef}: GRPO needs the reference's token log-probs")
        distance = _bounded(reference_logprobs.detach() - token_logprobs)
        penalty = distance.exp() - distance - 1
        losses = losses + settings.kl_coef * penalty
        metrics["grpo/kl"] = penalty.detach().sum()
    if settings.grpo_length == "token":
        return LossTerms(losses.sum(), tokens, metrics)
    if settings.grpo_length == "constant":
        return LossTerms(losses.sum() / settings.grpo_constant, branches, metrics)
    shares = (1 / branch_tokens.to(losses.dtype)).repeat_interleave(branch_tokens, output_size=tokens)
    return LossTerms((losses * shares).sum(), branches, metrics)


def grpo_row(
    settings: ObjectiveSettings,
    row: PackedRow,
    token_logprobs: Tensor,
    reference_token_logprobs: Tensor | None,
    old_token_logprobs: Tensor,
) -> LossTerms:
    """`grpo` of a row's branches; ValueError when one has no advantage."""
    if any(branch.advantage is None for branch in row.branches):
        raise ValueError("grpo needs the advantage of every branch")
    dtype, facts = token_logprobs.dtype, row.facts
    corrections, metrics = correction(
        settings.mismatch_correction, facts.engine_logprobs.to(dtype), facts.engine_entries, token_logprobs
    )
    terms = grpo(
        settings,
        token_logprobs,
        old_token_logprobs,
        reference_token_logprobs,
        corrections,
        facts.advantages.to(dtype),
        row.branch_offsets.diff(),
    )
    return LossTerms(terms.sum, terms.count, terms.metrics | metrics)


def _bounded(log_ratio: Tensor) -> Tensor:
    """Where exp overflows, a clipped token's gradient would be 0 times infinity."""
    return log_ratio.clamp(max=MAX_LOG_RATIO)
