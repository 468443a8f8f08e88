"""Exact prefix-tree attention on CPU: flash attention on the parts of a tree, merged by log-sum-exp.

A prefix attends to itself once. Every branch attends to its prefix (one rectangle for all branches of a group) and,
causally, to itself; the two results are merged with the weights that a softmax over the joint keys gives them:

    lse = logaddexp(lse_1, lse_2);  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The backward needs no merging: flash attention's backward recomputes each part's probabilities as exp(score - lse) and
subtracts rowsum(grad_out * out), so fed with the merged lse and out it yields the joint softmax's gradients, part by
part, which add up. No score outside the trees is ever computed, nor any prefix score once per branch.

It stands on two private aten operators (torch is pinned), whose layout a test checks: lse [batch, heads, queries] in
natural log and at least float32, any strides but a unit last one, and fewer key heads than query heads.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sip.kernels.tree_attention.compiled import compiled_kernels_apply, tree_attention_compiled

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionPart(NamedTuple):
    """A batch of equally shaped rectangles (or, causal, triangles) of the score matrix, as token spans of the row.

    queries, keys: (start, end); each span is `batch` equally long pieces one after another.
    merges: the queries already attended to other keys in an earlier part.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    batch: int
    causal: bool
    merges: bool


def attention_parts(layout: list[list[int]]) -> list[AttentionPart]:
    """The parts of a row's trees from its layout's lines; neighbouring branches of one length share a part."""
    parts = []
    for (group_start, prefix_end), lines in groupby(layout, key=lambda line: (line[0], line[1])):
        branches = [(start, end) for _, _, start, end in lines]
        parts.append(AttentionPart((group_start, prefix_end), (group_start, prefix_end), 1, True, False))
        parts.append(AttentionPart((prefix_end, branches[-1][1]), (group_start, prefix_end), 1, False, False))
        for _, run in groupby(branches, key=lambda branch: branch[1] - branch[0]):
            equal = list(run)
            span = (equal[0][0], equal[-1][1])
            parts.append(AttentionPart(span, span, len(equal), True, True))
    return parts


def tree_attention_cpu(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
    """Attention within a row's trees; arguments and result as `tree_attention_dense`, equal to rounding.

    float64, float32, bfloat16 or float16; differentiable once. bfloat16 takes the compiled kernels where they run.

    Raises:
        ValueError: the layout describes more tokens than there are.
    """
    value = value.contiguous()  # kept for backward, a view of [q | k | v] would keep what rotation has replaced
    if compiled_kernels_apply(query):
        return tree_attention_compiled(query, key, value, layout, scale)
    return tree_attention_merged(query, key, value, layout, scale)


def tree_attention_merged(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
    """`tree_attention_cpu` by merging, whatever kernels there are."""
    return _MergedTreeAttention.apply(query, key, value, layout, scale)


class _MergedTreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Tensor, scale: float) -> Tensor:
        lines = layout.tolist()
        if lines and lines[-1][3] > query.shape[0]:
            raise ValueError(f"the layout ends at token {lines[-1][3]}, the row has {query.shape[0]}")
        query, key, value = (
            tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
        )
        output = torch.zeros(query.shape, dtype=query.dtype)
        lse = torch.zeros(query.shape[:2], dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
        for part in attention_parts(lines):
            pieces = (_pieces(query, part.queries, part.batch), *_key_pieces(key, value, part))
            part_output, part_lse = _flash_forward(*pieces, 0.0, part.causal, scale=scale)
            into, into_lse = _pieces(output, part.queries, part.batch), _lse_pieces(lse, part)
            if part.merges:
                part_weight = torch.sigmoid(part_lse - into_lse)[..., None]
                into.copy_(torch.lerp(into.to(lse.dtype), part_output.to(lse.dtype), part_weight))
                into_lse.copy_(torch.logaddexp(into_lse, part_lse))
            else:
                into.copy_(part_output)
                into_lse.copy_(part_lse)
        ctx.save_for_backward(query, key, value, layout, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, layout, output, lse = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grads = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
        for part in attention_parts(layout.tolist()):
            part_grads = _flash_backward(
                _pieces(grad_output, part.queries, part.batch),
                _pieces(query, part.queries, part.batch),
                *_key_pieces(key, value, part),
                _pieces(output, part.queries, part.batch),
                _lse_pieces(lse, part),
                0.0,
                part.causal,
                scale=ctx.scale,
            )
            spans = (part.queries, part.keys, part.keys)
            for grad, span, part_grad in zip(grads, spans, part_grads, strict=True):
                _pieces(grad, span, part.batch).add_(part_grad)
        return grads[0], grads[1], grads[2], None, None


def _pieces(tensor: Tensor, span: tuple[int, int], batch: int) -> Tensor:
    """[S, H, D] -> a view [batch, H, length, D] of the tokens in `span`."""
    return tensor[span[0] : span[1]].unflatten(0, (batch, -1)).transpose(1, 2)


def _key_pieces(key: Tensor, value: Tensor, part: AttentionPart) -> tuple[Tensor, Tensor]:
    return _pieces(key, part.keys, part.batch), _pieces(value, part.keys, part.batch)


def _lse_pieces(lse: Tensor, part: AttentionPart) -> Tensor:
    """[S, H] -> a view [batch, H, length]."""
    return lse[part.queries[0] : part.queries[1]].unflatten(0, (part.batch, -1)).transpose(1, 2)
