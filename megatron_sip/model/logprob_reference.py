"""Pure-torch kernels with the signatures of the C++/CUDA ones: their tests' oracle, and the fallback without them.

They allocate temporaries of the logits' size in float64, so they are exact and slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_SOFTMAX_SCALE = 2.0**15
"""float16 holds nothing below 6e-8, so the softmax is kept times this between forward and backward (1 -> 32768)."""


def softmax_scale(dtype: torch.dtype) -> float:
    """What a stored softmax of `dtype` is multiplied by."""
    return HALF_SOFTMAX_SCALE if dtype == torch.float16 else 1.0


def row_statistics(
    logits: Tensor, logit_rows: Tensor, targets: Tensor, vocab_start: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the first `columns` columns of each row; see `logprob_ops` for the meaning of the outputs."""
    values = logits[:, :columns].double()
    reference = values.amax(dim=1) if columns else values.new_full((logits.shape[0],), -torch.inf)
    shifted = values - reference.masked_fill(reference.isneginf(), 0.0)[:, None]
    weights = shifted.exp()
    sums = torch.stack([weights.sum(dim=1), (weights * shifted.clamp_min(-1e4)).sum(dim=1)])
    local = targets - vocab_start
    owned = (local >= 0) & (local < columns)
    target_logits = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    target_logits[owned] = values[logit_rows[owned], local[owned]]
    return reference, sums, target_logits


def softmax_statistics_(
    logits: Tensor, logit_rows: Tensor, targets: Tensor, vocab_start: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`row_statistics`, then overwrites `logits` with minus its softmax (times `softmax_scale`), 0 past `columns`."""
    reference, sums, target_logits = row_statistics(logits, logit_rows, targets, vocab_start, columns)
    log_normaliser = torch.where(sums[0] == 0, 0.0, reference + sums[0].log())  # rows of -inf alone have softmax 0
    softmax = (logits[:, :columns].double() - log_normaliser[:, None]).exp()
    logits[:, :columns] = -softmax * softmax_scale(logits.dtype)
    logits[:, columns:] = 0
    return reference, sums, target_logits


def gradient(
    logits: Tensor,
    logit_rows: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    log_normaliser: Tensor,
    grad: Tensor,
    vocab_start: int,
    columns: int,
    stored_softmax: bool,
) -> Tensor:
    """d(sum of grad * logprobs) / d(logits); `logits` holds minus the softmax when `stored_softmax`."""
    coefficients = torch.zeros_like(log_normaliser).index_add_(0, logit_rows, grad.double())
    values = logits[:, :columns].double()
    softmax = -values / softmax_scale(logits.dtype) if stored_softmax else (values - log_normaliser[:, None]).exp()
    local = targets - vocab_start
    owned = (local >= 0) & (local < columns)
    positions = (logit_rows[owned], local[owned])
    # The log-prob is known better than a stored 16-bit softmax; a row without entries has coefficient 0 all along.
    softmax[positions] = logprobs[owned].double().exp()
    result = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    result[:, :columns] = torch.where(coefficients[:, None] == 0, 0.0, -coefficients[:, None] * softmax)
    result.index_put_(positions, grad[owned].double(), accumulate=True)
    return result.to(logits.dtype)


def gradient_(
    logits: Tensor,
    logit_rows: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    log_normaliser: Tensor,
    grad: Tensor,
    vocab_start: int,
    columns: int,
    stored_softmax: bool,
) -> None:
    """`gradient` written over `logits`."""
    logits.copy_(
        gradient(logits, logit_rows, targets, logprobs, log_normaliser, grad, vocab_start, columns, stored_softmax)
    )
