"""How tensors are cut for Megatron's tensor parallelism and fused layers, and put together again.

Pure functions on plain tensors without process groups. `to_shard` and `from_shards` are inverse to each other for
every layout, tensor-parallel size and vocabulary padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Layout(Enum):
    """How a Megatron parameter holds its HF tensors."""

    REPLICATED = "whole on every rank"
    COLUMNS = "split on dimension 1 (row-parallel linear)"
    VOCABULARY = "split on dimension 0, padded at the end"
    QKV = "split on dimension 0 by query group; within a group its query heads, then its key, then its value"
    GATE_UP = "both split on dimension 0; a rank's part of the gate, then its part of up"


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Query heads, query groups (KV heads) and the size of a head."""

    heads: int
    groups: int
    head_dim: int


class Sliceable(Protocol):
    """A tensor, or a safetensors slice that reads only what is asked for."""

    def __getitem__(self, index: slice | tuple[slice, slice]) -> Tensor: ...


def check_divisible(name: str, size: int, tp_size: int) -> None:
    """Raise ValueError when `size` things cannot be split evenly over the tensor-parallel ranks."""
    if size % tp_size:
        raise ValueError(f"--tensor-model-parallel-size {tp_size} does not divide {name} ({size}): choose a divisor")


def to_shard(
    layout: Layout,
    tensors: Sequence[Sliceable],
    shape: Sequence[int],
    attention: AttentionShape,
    vocab_size: int,
    rank: int,
    tp_size: int,
) -> Tensor:
    """Rank `rank`'s parameter of shape `shape`, cut and fused from whole HF tensors.

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
    check_divisible("the number of query groups", attention.groups, tp_size)
    groups = attention.groups // tp_size
    parts = []
    for tensor, heads in zip(tensors, _heads_per_group(attention), strict=True):
        size = groups * heads * attention.head_dim
        part = tensor[rank * size : (rank + 1) * size]
        parts.append(part.view(groups, heads * attention.head_dim, *part.shape[1:]))
    return torch.cat(parts, dim=1).flatten(0, 1)


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
    groups = attention.groups // len(shards)
    sizes = [heads * attention.head_dim for heads in _heads_per_group(attention)]
    pieces = [shard.view(groups, sum(sizes), *shard.shape[1:]).split(sizes, dim=1) for shard in shards]
    return tuple(_cat(list(part)).flatten(0, 1) for part in zip(*pieces, strict=True))


def _heads_per_group(attention: AttentionShape) -> tuple[int, int, int]:
    return attention.heads // attention.groups, 1, 1


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)
