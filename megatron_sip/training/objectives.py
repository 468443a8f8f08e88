"""Training objectives as pure functions of log-probs: NLL (SFT and RF-NLL), DPO, IPO and GRPO.

A model turns a packed row into one log-prob a predicted token and one sum a branch; `row_loss` turns those into a
sum, a count and metrics. Sums and counts add up over rows, micro-batches and ranks: the trainer divides the summed loss
by the global count, so the result does not depend on how examples were packed. All functions take any float dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_sip.model.packing import PackedRow
from megatron_sip.records import Example
from megatron_sip.training.objective_settings import DpoLoss, GrpoAverage, ObjectiveSettings

TIE_NATS = 1e-3
"""Log-ratios closer than this are equal: float32 sums over a branch differ by less with the order of addition, which depends
on the parallel layout."""
MAX_LOG_RATIO = 20.0
"""exp of a larger one overflows sooner or later, and then a clipped token's gradient is 0 times infinity."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What adds up over rows and ranks.

    sum: scalar, differentiable, to be divided by the global count.
    count: pairs (dpo), predicted tokens (sft, rf-nll, grpo by token) or branches (grpo by sequence); weights are in
        the sum only.
    metrics: detached sums and their counts, see objective_settings.METRIC_COUNTS.
    """

    sum: Tensor
    count: int
    metrics: dict[str, Tensor | float]


def nll(token_logprobs: Tensor, token_weights: Tensor) -> LossTerms:
    """Negative log-likelihood of the targets: SFT, and RF-NLL when the target is the judge's best candidate.

    token_logprobs, token_weights: [L]. sum = -sum(weight * log-prob), count = L.
    """
    values = -token_logprobs
    count = token_logprobs.numel()
    return LossTerms((values * token_weights).sum(), count, {"nll": values.detach().sum(), "target_tokens": count})


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_tokens: Tensor,
    weights: Tensor,
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

    Args: all [N]; policy_*, reference_*: log-prob sums; chosen_tokens: chosen branch lengths; weights: pair weights.
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
    return LossTerms((total * weights).sum(), pairs, metrics)


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


def row_loss(
    settings: ObjectiveSettings,
    examples: Sequence[Example],
    row: PackedRow,
    token_logprobs: Tensor,
    branch_logprobs: Tensor,
    reference_branch_logprobs: Tensor | None = None,
    *,
    reference_token_logprobs: Tensor | None = None,
    old_token_logprobs: Tensor | None = None,
    advantages: Tensor | None = None,
) -> LossTerms:
    """The loss of one packed row; a filler row gives a zero that still carries gradient, and the same metrics.

    Args:
        examples: the step's list, which row.examples indexes.
        token_logprobs: [L]; branch_logprobs, reference_branch_logprobs: [B]. The reference is needed when
            settings.needs_reference, and otherwise only feeds a metric.
        reference_token_logprobs, old_token_logprobs: [L] and advantages: [B], for GRPO only; without old log-probs the
            data counts as drawn from the present policy.

    Raises:
        ValueError: an input the objective needs is missing, has another length, or an example's roles do not fit.
    """
    lengths = [len(examples[e].branches[b]) for e, b in zip(row.examples, row.branches, strict=True)]
    for name, tensor, size in (
        ("token_logprobs", token_logprobs, sum(lengths)),
        ("branch_logprobs", branch_logprobs, len(lengths)),
        ("reference_branch_logprobs", reference_branch_logprobs, len(lengths)),
        ("reference_token_logprobs", reference_token_logprobs, sum(lengths)),
        ("old_token_logprobs", old_token_logprobs, sum(lengths)),
        ("advantages", advantages, len(lengths)),
    ):
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the row needs ({size},)")
    if settings.objective == "dpo":
        terms = _dpo_row(settings, examples, row, branch_logprobs, reference_branch_logprobs)
    elif settings.objective == "grpo":
        old = token_logprobs if old_token_logprobs is None else old_token_logprobs
        terms = _grpo_row(settings, examples, row, lengths, token_logprobs, old, reference_token_logprobs, advantages)
    else:
        terms = _nll_row(examples, row, lengths, token_logprobs)
    metrics = terms.metrics | _engine_difference(examples, row, lengths, token_logprobs.detach())
    if reference_branch_logprobs is not None:
        metrics |= _rollout_logratio(examples, row, lengths, branch_logprobs.detach(), reference_branch_logprobs)
    return LossTerms(terms.sum, terms.count, metrics)


def _nll_row(examples: Sequence[Example], row: PackedRow, lengths: list[int], token_logprobs: Tensor) -> LossTerms:
    weights: list[float] = []
    for example, branch, length in zip(row.examples, row.branches, lengths, strict=True):
        role = examples[example].roles[branch]
        if role != "target":
            raise ValueError(
                f"task {examples[example].task_index}: an NLL objective trains branches of role target, got {role}"
            )
        weights += [examples[example].weight] * length
    return nll(token_logprobs, token_logprobs.new_tensor(weights))


def _dpo_row(
    settings: ObjectiveSettings,
    examples: Sequence[Example],
    row: PackedRow,
    policy: Tensor,
    reference: Tensor | None,
) -> LossTerms:
    if reference is None:
        raise ValueError("dpo needs the reference model's branch log-probs")
    lines = {key: line for line, key in enumerate(zip(row.examples, row.branches, strict=True))}
    chosen, rejected, tokens, weights = [], [], [], []
    for index in dict.fromkeys(row.examples):
        example = examples[index]
        if sorted(example.roles) != ["chosen", "rejected"]:
            raise ValueError(
                f"task {example.task_index}: a DPO example is one chosen and one rejected, got {example.roles}"
            )
        best = example.roles.index("chosen")
        chosen.append(lines[index, best])
        rejected.append(lines[index, 1 - best])
        tokens.append(len(example.branches[best]))
        weights.append(example.weight)
    pick_chosen = torch.tensor(chosen, dtype=torch.int64, device=policy.device)
    pick_rejected = torch.tensor(rejected, dtype=torch.int64, device=policy.device)
    return dpo(
        policy[pick_chosen],
        policy[pick_rejected],
        reference[pick_chosen],
        reference[pick_rejected],
        policy.new_tensor(tokens),
        policy.new_tensor(weights),
        beta=settings.beta,
        nll_coef=settings.nll_coef,
        label_smoothing=settings.label_smoothing,
        loss_type=settings.dpo_loss,
    )


def _grpo_row(
    settings: ObjectiveSettings,
    examples: Sequence[Example],
    row: PackedRow,
    lengths: list[int],
    token_logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor | None,
) -> LossTerms:
    if advantages is None:
        raise ValueError("grpo needs advantages [B]")
    return grpo(
        token_logprobs,
        old_logprobs,
        reference_logprobs,
        advantages,
        torch.tensor(lengths, dtype=torch.int64, device=token_logprobs.device),
        token_logprobs.new_tensor([examples[index].weight for index in row.examples]),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_coef=settings.kl_coef,
        average=settings.grpo_average,
    )


def _rollout_logratio(
    examples: Sequence[Example], row: PackedRow, lengths: list[int], policy: Tensor, reference: Tensor
) -> dict[str, Tensor | float]:
    """Sum of policy minus reference log-prob over the tokens of the rollouts that are trained on.

    Exact for those, and a sign of drift. It estimates KL(policy || reference) only where every rollout of the present policy
    is trained on, as in GRPO: DPO's are the best and the worst, and what was learnt from such ones sets its sign. The
    others' reference log-probs would cost a forward pass over all of them.
    """
    lines = [
        line
        for line, (example, branch) in enumerate(zip(row.examples, row.branches, strict=True))
        if examples[example].kinds[branch] == "rollout"
    ]
    pick = torch.tensor(lines, dtype=torch.int64, device=policy.device)
    return {
        "rollout_logratio": (policy[pick] - reference.detach()[pick]).sum(),
        "rollout_tokens": sum(lengths[line] for line in lines),
    }


def _engine_difference(
    examples: Sequence[Example], row: PackedRow, lengths: list[int], token_logprobs: Tensor
) -> dict[str, Tensor | float]:
    """Sum of |log-prob here - log-prob in the rollout engine| over the tokens whose engine log-prob is known."""
    places: list[int] = []
    engine: list[float] = []
    start = 0
    for example, branch, length in zip(row.examples, row.branches, lengths, strict=True):
        known = examples[example].engine_logprobs[branch] if examples[example].engine_logprobs else None
        if known is not None:
            if len(known) != length:
                task = examples[example].task_index
                raise ValueError(f"task {task}: {len(known)} engine log-probs for a branch of {length} tokens")
            places += range(start, start + length)
            engine += known
        start += length
    pick = torch.tensor(places, dtype=torch.int64, device=token_logprobs.device)
    difference = (token_logprobs[pick] - token_logprobs.new_tensor(engine)).abs().sum()
    return {"engine_logprob_abs_diff": difference, "engine_tokens": len(engine)}


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO)
