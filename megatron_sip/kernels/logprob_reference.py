"""Pure-torch kernels with the signatures of the C++/CUDA ones: their tests' oracle, and the fallback without them.

They allocate temporaries of the logits' size in float64, so they are exact and slow.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_statistics(logits: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Statistics of the first `columns` columns of each row; see `logprob_ops` for the meaning of the outputs."""
    values = logits[:, :columns].double()
    reference = values.amax(dim=1) if columns else values.new_full((logits.shape[0],), -torch.inf)
    shifted = values - reference.masked_fill(reference.isneginf(), 0.0)[:, None]
    return reference, shifted.exp().sum(dim=1)


def gradient(
    logits: Tensor,
    logit_rows: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    log_normaliser: Tensor,
    grad: Tensor,
    vocab_start: int,
    columns: int,
) -> Tensor:
    """d(sum of grad * logprobs) / d(logits)."""
    coefficients = torch.zeros_like(log_normaliser).index_add_(0, logit_rows, grad.double())
    values = logits[:, :columns].double()
    softmax = (values - log_normaliser[:, None]).exp()
    local = targets - vocab_start
    owned = (local >= 0) & (local < columns)
    # What another shard owns goes to one column more, which is left out: a mask's entries would be counted on the host.
    softmax = torch.nn.functional.pad(softmax, (0, 1))
    # As the kernels do, which know the log-prob better than the softmax.
    softmax[logit_rows, local.where(owned, columns)] = logprobs.double().exp()
    rows, width = logits.shape
    result = torch.zeros(rows, width + 1, dtype=torch.float64, device=logits.device)
    result[:, :columns] = torch.where(coefficients[:, None] == 0, 0.0, -coefficients[:, None] * softmax[:, :columns])
    result.index_put_((logit_rows, local.where(owned, width)), grad.double(), accumulate=True)
    return result[:, :width].to(logits.dtype)


def gradient_(
    logits: Tensor,
    logit_rows: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    log_normaliser: Tensor,
    grad: Tensor,
    vocab_start: int,
    columns: int,
) -> None:
    """`gradient` written over `logits`."""
    logits.copy_(gradient(logits, logit_rows, targets, logprobs, log_normaliser, grad, vocab_start, columns))
