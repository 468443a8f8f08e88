"""How tensors are cut for Megatron's tensor parallelism and fused layers, and put together again.

Pure functions on plain tensors without process groups. `to_shard` and `from_shards` are inverse to each other for
every layout, tensor-parallel size and vocabulary padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from megatron_sip.model.tensor_parallel import AttentionShape


class Layout(Enum):
    """How a Megatron parameter holds its HF tensors."""

    REPLICATED = "whole on every rank"
    COLUMNS = "split on dimension 1 (row-parallel linear)"
    VOCABULARY = "split on dimension 0, padded at the end"
    QKV = "one group after the other, of each its query heads, then its key, then its value; split on dimension 0"
    GATE_UP = "both split on dimension 0; a rank's part of the gate, then its part of up"


class Sliceable(Protocol):
    """A tensor, or a safetensors slice that reads only what is asked for."""

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor: ...


def is_shard_of(layout: Layout, shape: Sequence[int], whole: Sequence[Sequence[int]], tp_size: int) -> bool:
    """Whether a parameter of `shape` is one of `tp_size` equal parts of HF tensors of the shapes `whole`.

    A vocabulary's parts may together be larger: Megatron pads it.
    """
    first, *rest = shape
    rows = sum(size[0] for size in whole)
    if layout is Layout.REPLICATED:
        return tuple(shape) == tuple(whole[0])
    if layout is Layout.COLUMNS:
        return (first, *(size * tp_size for size in rest)) == tuple(whole[0])
    if layout is Layout.VOCABULARY:
        return first * tp_size >= rows and tuple(rest) == tuple(whole[0][1:])
    return first * tp_size == rows and tuple(rest) == tuple(whole[0][1:])


def to_shard(
    layout: Layout,
    tensors: Sequence[Sliceable],
    shape: Sequence[int],
    attention: AttentionShape,
    vocab_size: int,
    rank: int,
) -> Tensor:
    """Tensor-parallel rank `rank`'s parameter of shape `shape`, cut and fused from whole HF tensors.

    A vocabulary shard's rows past the end of the HF tensor are zero. Reads only the rank's part of each tensor.
    """
    if layout is Layout.REPLICATED:
        return tensors[0][:]
    if layout is Layout.COLUMNS:
        return tensors[0][:, rank * shape[1] : (rank + 1) * shape[1]]
    if layout is Layout.VOCABULARY:
        first, last = (min(bound * shape[0], vocab_size) for bound in (rank, rank + 1))
        rows = tensors[0][first:last]
        padding = rows.new_zeros((shape[0] - len(rows), *shape[1:]))
        return torch.cat([rows, padding]) if len(padding) else rows
    if layout is Layout.GATE_UP:
        half = shape[0] // 2
        return torch.cat([tensor[rank * half : (rank + 1) * half] for tensor in tensors])
    return _qkv_rows(tensors, rank * shape[0], (rank + 1) * shape[0], attention)


def from_shards(
    layout: Layout, shards: Sequence[Tensor], attention: AttentionShape, vocab_size: int
) -> tuple[Tensor, ...]:
    """The whole HF tensors, contiguous, from the parameter's shards in rank order. Views where no copy is needed."""
    if layout is Layout.REPLICATED:
        return (shards[0],)
    if layout is Layout.COLUMNS:
        return (_cat(shards, dim=1),)
    if layout is Layout.VOCABULARY:
        return (_cat(shards)[:vocab_size],)
    if layout is Layout.GATE_UP:
        halves = [shard.chunk(2) for shard in shards]
        return _cat([gate for gate, _ in halves]), _cat([up for _, up in halves])
    sizes = _qkv_sizes(attention)
    fused = _cat(shards).view(attention.groups, sum(sizes), *shards[0].shape[1:])
    return tuple(part.flatten(0, 1).contiguous() for part in fused.split(sizes, dim=1))


def _qkv_rows(tensors: Sequence[Sliceable], first: int, last: int, attention: AttentionShape) -> Tensor:
    """Rows first:last of the fused tensor; they may begin and end inside a group. Reads only the groups they touch."""
    sizes = _qkv_sizes(attention)
    group, end = first // sum(sizes), -(-last // sum(sizes))
    parts = []
    for tensor, size in zip(tensors, sizes, strict=True):
        part = tensor[group * size : end * size]
        parts.append(part.view(end - group, size, *part.shape[1:]))
    start = first - group * sum(sizes)
    return torch.cat(parts, dim=1).flatten(0, 1)[start : start + last - first]


def _qkv_sizes(attention: AttentionShape) -> tuple[int, int, int]:
    """Rows of a group's query heads, its key and its value."""
    return attention.heads // attention.groups * attention.head_dim, attention.head_dim, attention.head_dim


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)
