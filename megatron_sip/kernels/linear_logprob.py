"""Log-probs straight from hidden states and the output weight, never holding more than a chunk of logits.

The vocabulary is gone through in chunks, never the rows: chunking rows would read the whole weight once per chunk. The
chunks' logits are computed again in the backward pass. Use it when [T, V/tp] logits do not fit; one plain projection
followed by `token_logprobs` is faster when they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sip.kernels.fp32_lm_head import project
from megatron_sip.kernels.logprob import (
    VocabularyShard,
    check_inputs,
    combine_over_ranks,
    finish_logprobs,
    move_reference,
    output_dtype,
    target_logits,
    vocabulary_shard,
)
from megatron_sip.kernels.logprob_ops import operators


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `first` to `last` of the local weight; its first is token `vocab_start`, and `columns` are no padding."""

    first: int
    last: int
    vocab_start: int
    columns: int


def vocabulary_chunks(shard: VocabularyShard, chunk_columns: int) -> Iterator[Chunk]:
    """The columns of a shard that count, in order; whole chunks of padding are left out."""
    for first in range(0, shard.columns, chunk_columns):
        last = min(first + chunk_columns, shard.columns)
        yield Chunk(first, last, shard.start + first, last - first)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    logit_rows: Tensor,
    targets: Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    chunk_columns: int = 8192,
) -> Tensor:
    """`token_logprobs(fp32_lm_head(hidden, weight), ...)`, differentiable with respect to `hidden` and `weight`.

    Args:
        hidden: [T, H], the same on all ranks of `tp_group` (gather sequence-parallel states before).
        weight: [V/tp, H], dtype of `hidden`.
        chunk_columns: vocabulary entries whose logits [T, chunk_columns] exist at a time.
        logit_rows, targets, tp_group, vocab_start, vocab_size: as of `token_logprobs`.

    Returns:
        token log-probs [L], float32 (float64 for float64 inputs). The gradient of `hidden` is complete: already summed
        over `tp_group`.

    Raises:
        ValueError, TypeError: shapes, dtypes or indices that do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, weight {weight.dtype}")
    if chunk_columns < 1:
        raise ValueError(f"chunk_columns must be at least 1, got {chunk_columns}")
    shard = vocabulary_shard(weight.shape[0], tp_group, vocab_start, vocab_size)
    check_inputs(hidden, logit_rows, targets, shard)
    return _LinearTokenLogprobs.apply(hidden.contiguous(), weight, logit_rows, targets, shard, chunk_columns)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        logit_rows: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        chunk_columns: int,
    ) -> Tensor:
        rows = hidden.shape[0]
        reference = torch.full((rows,), -torch.inf, dtype=torch.float64, device=hidden.device)
        sums = torch.zeros_like(reference)
        own_targets = torch.zeros(targets.shape[0], dtype=torch.float64, device=hidden.device)
        for chunk in vocabulary_chunks(shard, chunk_columns):
            logits = project(hidden, weight[chunk.first : chunk.last])
            chunk_reference, chunk_sums = operators.row_statistics(logits, chunk.columns)
            higher = torch.maximum(reference, chunk_reference)
            sums = move_reference(reference, sums, higher) + move_reference(chunk_reference, chunk_sums, higher)
            reference = higher
            own_targets += target_logits(logits, logit_rows, targets, chunk.vocab_start, chunk.columns)
        reference, sums, all_targets = combine_over_ranks(reference, sums, own_targets, shard.group)
        tokens, normaliser = finish_logprobs(reference, sums, all_targets, logit_rows, output_dtype(hidden))
        ctx.shard, ctx.chunk_columns = shard, chunk_columns
        ctx.save_for_backward(hidden, weight, logit_rows, targets, tokens, normaliser)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Any, ...]:
        hidden, weight, logit_rows, targets, tokens, normaliser = ctx.saved_tensors
        grad, logprobs = grad_tokens.double().contiguous(), tokens.double()
        grad_hidden = torch.zeros(hidden.shape, dtype=output_dtype(hidden), device=hidden.device)
        grad_weight = torch.zeros_like(weight)
        for chunk in vocabulary_chunks(ctx.shard, ctx.chunk_columns):
            rows_of_weight = weight[chunk.first : chunk.last]
            logits = project(hidden, rows_of_weight)
            operators.gradient_(
                logits, logit_rows, targets, logprobs, normaliser, grad, chunk.vocab_start, chunk.columns
            )
            grad_logits = logits.to(hidden.dtype)
            grad_hidden += grad_logits @ rows_of_weight
            torch.mm(grad_logits.T, hidden, out=grad_weight[chunk.first : chunk.last])
        if ctx.shard.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.shard.group)
        return grad_hidden.to(hidden.dtype), grad_weight, *[None] * 4
