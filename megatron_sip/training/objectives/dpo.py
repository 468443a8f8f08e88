"""DPO and IPO on pairs of branches of one prefix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_sip.model.packing import PackedRow
from megatron_sip.training.objectives.settings import DpoLoss, ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

METRIC_COUNTS = {
    "dpo_loss": "pairs",
    "reward_margin": "pairs",
    "reward_accuracy": "pairs",
    "chosen_reward": "pairs",
    "rejected_reward": "pairs",
    "chosen_logprob": "pairs",
    "rejected_logprob": "pairs",
    "chosen_nll": "chosen_tokens",
}
TIE_NATS = 1e-3
"""Log-ratios closer than this are equal: float32 sums over a branch differ by less with the order of addition, which depends
on the parallel layout."""


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_tokens: Tensor,
    *,
    beta: float = 0.1,
    nll_coef: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: DpoLoss = "sigmoid",
) -> LossTerms:
    """Direct preference optimisation on N pairs of branch log-prob sums.

    With h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected), a pair's loss is
      sigmoid: -(1 - s) logsigmoid(beta h) - s logsigmoid(-beta h), s = label_smoothing (Rafailov et al. 2023, eq. 7);
      ipo: (h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17);
    plus nll_coef times the chosen branch's mean token NLL.

    Args: all [N]; policy_*, reference_*: log-prob sums; chosen_tokens: chosen branch lengths.
    Metrics: rewards are beta (policy - reference); accuracy counts a tie, h within TIE_NATS of 0 as before the first update,
    as a half. dpo_loss is without the NLL term, and chosen_nll a mean over tokens, not over branches.
    """
    chosen_ratio = policy_chosen - reference_chosen.detach()
    rejected_ratio = policy_rejected - reference_rejected.detach()
    logits = chosen_ratio - rejected_ratio
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * logsigmoid(beta * logits) - label_smoothing * logsigmoid(-beta * logits)
    else:
        losses = (logits - 1 / (2 * beta)) ** 2
    total = losses if nll_coef == 0 else losses + nll_coef * -policy_chosen / chosen_tokens
    margin = beta * logits.detach()
    pairs = losses.numel()
    metrics: dict[str, Tensor | float] = {
        "pairs": pairs,
        "dpo_loss": losses.detach().sum(),
        "reward_margin": margin.sum(),
        "reward_accuracy": torch.where(logits.detach().abs() <= TIE_NATS, 0.5, (margin > 0).to(margin.dtype)).sum(),
        "chosen_reward": beta * chosen_ratio.detach().sum(),
        "rejected_reward": beta * rejected_ratio.detach().sum(),
        "chosen_logprob": policy_chosen.detach().sum(),
        "rejected_logprob": policy_rejected.detach().sum(),
        "chosen_nll": -policy_chosen.detach().sum(),
        "chosen_tokens": chosen_tokens.sum(),
    }
    return LossTerms(total.sum(), pairs, metrics)


def dpo_row(
    settings: ObjectiveSettings, row: PackedRow, token_logprobs: Tensor, reference_token_logprobs: Tensor | None
) -> LossTerms:
    """`dpo` of a row's pairs; ValueError unless every example is one, and without the reference model's log-probs [L]."""
    if reference_token_logprobs is None:
        raise ValueError("dpo needs the reference model's token log-probs")
    for example in row.examples:
        roles = [branch.role for branch in example.branches]
        if sorted(roles) != ["chosen", "rejected"]:
            raise ValueError(f"task {example.task_index}: a DPO example is one chosen and one rejected, got {roles}")
    policy, reference = (branch_sums(each, row.branch_offsets) for each in (token_logprobs, reference_token_logprobs))
    chosen, rejected = row.facts.pairs.unbind(1)
    return dpo(
        policy[chosen],
        policy[rejected],
        reference[chosen],
        reference[rejected],
        row.branch_offsets.diff()[chosen].to(policy.dtype),
        beta=settings.beta,
        nll_coef=settings.nll_coef,
        label_smoothing=settings.label_smoothing,
        loss_type=settings.dpo_loss,
    )


def branch_sums(token_logprobs: Tensor, offsets: Tensor) -> Tensor:
    """Log-probs of whole branches [B] from those of their tokens [L]; branch b owns offsets[b]:offsets[b + 1].

    Added up in float64: DPO's margin is a small difference of large sums.
    """
    branches = torch.arange(len(offsets) - 1, device=offsets.device)
    branch_of = branches.repeat_interleave(offsets.diff(), output_size=len(token_logprobs))
    sums = token_logprobs.new_zeros(len(offsets) - 1, dtype=torch.float64)
    return sums.index_add(0, branch_of, token_logprobs.double()).to(token_logprobs.dtype)
