"""Log-probs of tokens straight from (vocab-sharded) logits, exact to float32 and in one pass over them.

    logprobs = token_logprobs(logits, row.logit_rows, row.targets)

A row of logits may predict several tokens (the last prefix token predicts the first token of each branch): it is
projected once and the gradients of its entries add up. The gradient is written over the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sip.kernels.logprob_ops import operators

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """Which part of the vocabulary a rank's logits hold; `columns` of them are no padding."""

    start: int
    columns: int
    vocab_size: int
    group: ProcessGroup | None


def token_logprobs(
    logits: Tensor,
    logit_rows: Tensor,
    targets: Tensor,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    inplace: bool = True,
) -> Tensor:
    """Log-probs of the targets [L], at most 0.

    In nats, float32 (float64 for float64 logits); differentiable with respect to `logits`.

    Args:
        logits: [T, V/tp], float32, bfloat16, float16 or float64.
        logit_rows: int64 [L], the row of `logits` that predicts each target.
        targets: int64 [L], token ids in the whole vocabulary.
        tp_group: ranks that share the vocabulary; all must call, and all get equal results.
        vocab_start: token id of this rank's first column.
        vocab_size: true vocabulary size. Columns from it on are padding: they leave the softmax and get no gradient.
            By default all columns count, which is what Megatron's own loss does with its padded vocabulary.
        inplace: when a gradient is needed, use the logits' memory for it. The op must then own that buffer: contiguous,
            not a leaf, read by nobody afterwards. The gradient can be computed once. False leaves `logits` alone.

    Raises:
        ValueError, TypeError: shapes, dtypes or (on the CPU; a device-side assertion on CUDA) indices that do not fit.
        RuntimeError: a second backward pass through logits that were consumed in place.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, V], got shape {list(logits.shape)}")
    shard = vocabulary_shard(logits.shape[1], tp_group, vocab_start, vocab_size)
    check_inputs(logits, logit_rows, targets, shard)
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_gradient:
        _check_owned(logits)
    logits = logits.contiguous()
    if shard.group is None and not (inplace and needs_gradient):
        return operators.token_logprobs(logits, logit_rows, targets, shard.start, shard.columns)[0]
    return _TokenLogprobs.apply(logits, logit_rows, targets, shard, inplace)


def vocabulary_shard(
    local_columns: int, tp_group: ProcessGroup | None, vocab_start: int, vocab_size: int | None
) -> VocabularyShard:
    """This rank's part; a group of one rank counts as none."""
    ranks = dist.get_world_size(tp_group) if tp_group is not None else 1
    total = (
        vocab_size if vocab_size is not None else (local_columns * ranks if ranks > 1 else vocab_start + local_columns)
    )
    if vocab_start < 0:
        raise ValueError(f"vocab_start must not be negative, got {vocab_start}")
    if (
        total <= 0
        or (ranks == 1 and total > vocab_start + local_columns)
        or total > ranks * local_columns + vocab_start
    ):
        raise ValueError(
            f"vocab_size {total} does not fit {local_columns} columns per rank on {ranks} ranks from {vocab_start}"
        )
    columns = min(max(total - vocab_start, 0), local_columns)
    return VocabularyShard(vocab_start, columns, total, tp_group if ranks > 1 else None)


def check_inputs(scores: Tensor, logit_rows: Tensor, targets: Tensor, shard: VocabularyShard) -> None:
    """Raises TypeError or ValueError on what cannot be meant; `scores` is anything with T rows in a logits dtype."""
    if scores.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be one of {LOGIT_DTYPES}, got {scores.dtype}")
    for name, tensor in (("logit_rows", logit_rows), ("targets", targets)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {list(tensor.shape)}")
        if tensor.device != scores.device:
            raise ValueError(f"{name} is on {tensor.device}, the logits on {scores.device}")
    if logit_rows.shape != targets.shape:
        raise ValueError(f"logit_rows has {logit_rows.numel()} entries, targets {targets.numel()}")
    if scores.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(scores.shape[0], logit_rows, targets, shard)
    elif scores.device.type == "cuda":
        _check_values_on_device(scores.shape[0], logit_rows, targets, shard)


def _check_values(rows: int, logit_rows: Tensor, targets: Tensor, shard: VocabularyShard) -> None:
    for name, tensor, limit in (("logit_rows", logit_rows, rows), ("targets", targets, shard.vocab_size)):
        if tensor.numel():
            values = tensor.numpy()  # the host's own memory
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= limit:
                raise ValueError(f"{name} must lie in [0, {limit}), got values from {low} to {high}")


def _check_values_on_device(rows: int, logit_rows: Tensor, targets: Tensor, shard: VocabularyShard) -> None:
    """The same without waiting for the device: what is wrong stops the device with the message."""
    for name, tensor, limit in (("logit_rows", logit_rows, rows), ("targets", targets, shard.vocab_size)):
        torch._assert_async(((tensor >= 0) & (tensor < limit)).all(), f"{name} must lie in [0, {limit})")


def _check_owned(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError("logits are a leaf that requires grad and would be overwritten: pass inplace=False")
    if not logits.is_contiguous():
        raise ValueError(
            f"logits of shape {list(logits.shape)} and strides {logits.stride()} are not contiguous and cannot be "
            "consumed in place: pass inplace=False"
        )


def target_logits(logits: Tensor, logit_rows: Tensor, targets: Tensor, vocab_start: int, columns: int) -> Tensor:
    """float64 [L]: the logit of each entry's target, 0 where another shard owns it."""
    local = targets - vocab_start
    owned = (local >= 0) & (local < columns)
    return logits[logit_rows, local.where(owned, 0)].double().where(owned, 0.0)


def combine_over_ranks(
    reference: Tensor, sums: Tensor, target_logits: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of whole rows from those of their vocabulary shards: one MAX and one packed SUM over `group`."""
    if group is None:
        return reference, sums, target_logits
    highest = reference.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    packed = torch.cat([move_reference(reference, sums, highest), target_logits])
    dist.all_reduce(packed, dist.ReduceOp.SUM, group=group)
    rows = reference.shape[0]
    return highest, packed[:rows], packed[rows:]


def move_reference(reference: Tensor, sums: Tensor, new_reference: Tensor) -> Tensor:
    """`sums` [T] as if they had been taken relative to `new_reference` (not below `reference`)."""
    return torch.where(reference.isneginf(), sums, sums * (reference - new_reference).exp())


def finish_logprobs(
    reference: Tensor,
    sums: Tensor,
    target_logits: Tensor,
    logit_rows: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(token log-probs, log-normaliser float64 [T]) from the statistics of whole rows."""
    log_sums = sums.log()
    tokens = (target_logits - reference[logit_rows]) - log_sums[logit_rows]
    return tokens.clamp_max(0.0).to(dtype), reference + log_sums


def output_dtype(logits: Tensor) -> torch.dtype:
    """float32, so that sums and differences of log-probs keep their digits; float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _TokenLogprobs(torch.autograd.Function):
    """The op over tensor-parallel shards, and the one that consumes its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        logit_rows: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        inplace: bool,
    ) -> Tensor:
        reference, row_sums = operators.row_statistics(logits, shard.columns)
        own_targets = target_logits(logits, logit_rows, targets, shard.start, shard.columns)
        reference, row_sums, all_targets = combine_over_ranks(reference, row_sums, own_targets, shard.group)
        tokens, normaliser = finish_logprobs(reference, row_sums, all_targets, logit_rows, output_dtype(logits))
        ctx.shard, ctx.inplace, ctx.consumed = shard, inplace, False
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, logit_rows, targets, tokens, normaliser)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.consumed:
            raise RuntimeError(
                "the logits were consumed by an earlier backward pass: they now hold its gradient. "
                "Pass inplace=False to differentiate more than once"
            )
        logits, logit_rows, targets, tokens, normaliser = ctx.saved_tensors
        entries = (logit_rows, targets, tokens.double(), normaliser, grad.double().contiguous())
        arguments = (logits, *entries, ctx.shard.start, ctx.shard.columns)
        if not ctx.inplace:
            return operators.gradient(*arguments), *[None] * 4
        ctx.consumed = True
        operators.gradient_(*arguments)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), *[None] * 4


@torch.library.custom_op("megatron_sip::token_logprobs", mutates_args=())
def _token_logprobs(
    logits: Tensor, logit_rows: Tensor, targets: Tensor, vocab_start: int, columns: int
) -> tuple[Tensor, Tensor]:
    """The op on whole rows, without side effects: token log-probs and log-normaliser."""
    reference, sums = operators.row_statistics(logits, columns)
    own_targets = target_logits(logits, logit_rows, targets, vocab_start, columns)
    return finish_logprobs(reference, sums, own_targets, logit_rows, output_dtype(logits))


@_token_logprobs.register_fake
def _(logits: Tensor, logit_rows: Tensor, targets: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    dtype = output_dtype(logits)
    return (
        logits.new_empty(targets.shape[0], dtype=dtype),
        logits.new_empty(logits.shape[0], dtype=torch.float64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, logit_rows, targets, ctx.vocab_start, ctx.columns = inputs
    tokens, normaliser = output
    ctx.mark_non_differentiable(normaliser)
    ctx.save_for_backward(logits, logit_rows, targets, tokens, normaliser)


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Any, ...]:
    logits, logit_rows, targets, tokens, normaliser = ctx.saved_tensors
    entries = (logit_rows, targets, tokens.double(), normaliser, grad.double().contiguous())
    return operators.gradient(logits, *entries, ctx.vocab_start, ctx.columns), None, None, None, None


_token_logprobs.register_autograd(_backward, setup_context=_setup_context)
