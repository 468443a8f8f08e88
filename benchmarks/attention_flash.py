"""Prefix-tree attention by variable-length flash attention on a GPU, for `attention.py` and `train_step_variant.py`.

The parts are those of `kernels/tree_attention/cpu.py`: one call for all causal triangles of a row (each prefix on itself, each
branch on itself), one for all rectangles (the branches of a group on its prefix), merged by their log-sum-exps; backward is
flash attention's own of both, fed with the merged output and log-sum-exp. Training does not use it: whether it is faster than
FlexAttention is what is to be measured. It has not run on a GPU; a test emulates the two operators on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sip.kernels.tree_attention.dense import token_spans
from megatron_sip.kernels.tree_attention.flex import RowCache


@dataclass(frozen=True)
class Segments:
    """A row of S tokens and B branches as sequences for flash attention; offsets are int32 [2 B + 2].

    causal: offsets of prefixes, branches and padding. queries: of each group's prefix (without keys) and of all its branches;
    keys: of the prefixes, in a copy of the keys in the order `prefixes_first`, int64 [S].
    in_branch, in_prefixes: bool [S]; which queries have such keys, which of the copied keys are a prefix's. inside: no padding.
    """

    causal: Tensor
    queries: Tensor
    keys: Tensor
    prefixes_first: Tensor
    in_branch: Tensor
    in_prefixes: Tensor
    inside: Tensor


def row_segments(layout: Tensor, length: int) -> Segments:
    """The segments of a row, without synchronisation: sequences that a group does not need have length 0."""
    spans = token_spans(layout, length)
    in_branch = spans.branch_start != spans.group_start
    in_prefix = spans.inside & ~in_branch
    group, prefix_end, start, end = layout.unbind(1)
    first = torch.ones_like(group, dtype=torch.bool)
    first[1:] = group[1:] != group[:-1]
    last = torch.searchsorted(group.contiguous(), group.contiguous(), right=True) - 1
    prefix = torch.where(first, prefix_end - group, 0)
    branches = torch.where(first, end[last] - prefix_end, 0)
    nothing = torch.zeros_like(prefix)
    return Segments(
        causal=_offsets(prefix, end - start, length),
        queries=_offsets(prefix, branches, length),
        keys=_offsets(nothing, prefix, None),
        prefixes_first=in_prefix.int().argsort(descending=True, stable=True),
        in_branch=in_branch,
        in_prefixes=torch.arange(length, device=layout.device) < in_prefix.sum(),
        inside=spans.inside,
    )


def _offsets(one: Tensor, other: Tensor, length: int | None) -> Tensor:
    """int32 [2 B + 2]: where sequences of these lengths, in turn, begin and end; then one up to `length` (None: of none)."""
    ends = torch.stack([one, other], dim=1).reshape(-1).cumsum(0, dtype=torch.int32)
    begin = ends.new_zeros(1)
    final = torch.cat([begin, ends])[-1:] if length is None else ends.new_full((1,), length)
    return torch.cat([begin, ends, final])


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [S, H, D], log-sum-exp float32 [H, S]) of sequences with these offsets."""
    longest = len(query)
    arguments = (queries, keys, longest, longest, 0.0, causal)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *arguments, False, scale=scale)
    return output, lse


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, queries: Tensor, keys: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value; of what no sequence holds they may be anything."""
    longest, unused = len(query), torch.empty(0, device=query.device)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    arguments = (queries, keys, longest, longest, 0.0, causal, seed, unused)
    return torch.ops.aten._flash_attention_backward(grad, query, key, value, output, lse, *arguments, scale=scale)


class FlashTreeAttention:
    """Attention within a row's trees; arguments and result as `tree_attention_dense`, in bfloat16 or float16."""

    def __init__(
        self, forward: Callable[..., Any] = flash_forward, backward: Callable[..., Any] = flash_backward
    ) -> None:
        self._forward, self._backward = forward, backward
        self._rows = RowCache(row_segments)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
        row = self._rows.of(layout, len(query))
        output = _FlashTree.apply(query, key, value, row, scale, self._forward, self._backward)
        return output * row.inside[:, None, None]


class _FlashTree(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Segments, scale: float, forward: Any, backward: Any
    ) -> Tensor:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        own, own_lse = forward(query, key, value, row.causal, row.causal, True, scale)
        prefix = (key[row.prefixes_first], value[row.prefixes_first])
        shared, shared_lse = forward(query, *prefix, row.queries, row.keys, False, scale)
        weight = torch.sigmoid(shared_lse - own_lse).T[:, :, None]
        merged = torch.lerp(own.to(weight.dtype), shared.to(weight.dtype), weight).to(own.dtype)
        output = torch.where(row.in_branch[:, None, None], merged, own)
        lse = torch.where(row.in_branch, torch.logaddexp(own_lse, shared_lse), own_lse)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.row, ctx.scale, ctx.backward_of = row, scale, backward
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        row, grad = ctx.row, grad.contiguous()
        grads = ctx.backward_of(grad, query, key, value, output, lse, row.causal, row.causal, True, ctx.scale)
        prefix = (key[row.prefixes_first], value[row.prefixes_first])
        shared = ctx.backward_of(grad, query, *prefix, output, lse, row.queries, row.keys, False, ctx.scale)
        of_query = grads[0] + shared[0].where(row.in_branch[:, None, None], 0.0)
        of_keys = [
            own.index_add(0, row.prefixes_first, part.where(row.in_prefixes[:, None, None], 0.0))
            for own, part in zip(grads[1:], shared[1:], strict=True)
        ]
        return of_query, *of_keys, None, None, None, None
