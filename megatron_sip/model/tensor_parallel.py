"""The sizes of a model that tensor parallelism divides, and what is wrong with those that it cannot. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Query heads, query groups (KV heads) and the size of a head."""

    heads: int
    groups: int
    head_dim: int


def tensor_parallel_faults(attention: AttentionShape, ffn_size: int, tp_size: int) -> list[str]:
    """Why a model cannot be split over `tp_size` ranks: one message per fault, none where it can.

    With fewer query groups than ranks Megatron copies no weights: a rank holds `1 / tp_size` of the fused rows, wherever
    that cuts a group, and the ranks gather queries, keys and values after the product.
    """
    flag = f"--tensor-model-parallel-size {tp_size}"
    rows = (attention.heads + 2 * attention.groups) * attention.head_dim
    faults = [
        f"{flag} does not divide {name} ({size}): choose a divisor"
        for name, size in (("the number of attention heads", attention.heads), ("the MLP's size", ffn_size))
        if size % tp_size
    ]
    if attention.groups % tp_size and tp_size % attention.groups:
        faults.append(f"{flag} must be a divisor or a multiple of the number of query groups ({attention.groups})")
    elif rows % tp_size:
        faults.append(
            f"{flag} does not divide the rows of the fused queries, keys and values ({rows}): choose a divisor"
        )
    return faults
