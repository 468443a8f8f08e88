"""Of which model a Megatron checkpoint is: its saved arguments against the HF config, before any of its weights is loaded.

Megatron itself compares three numbers, fills or cuts a vocabulary of another size without a word, and lists forty keys
where others differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from megatron_sip.checkpoints.folder import weights_folder
from megatron_sip.errors import DataError
from megatron_sip.hf.families import flag_of
from megatron_sip.hf.files import rounds

SAVED_NAMES = {"norm_epsilon": "layernorm_epsilon"}
"""Where Megatron's argument has another name than its flag."""


def require_same_model(folder: Path, wanted: Mapping[str, Any], source: str) -> argparse.Namespace | None:
    """The arguments saved in `folder`'s latest checkpoint, when they are of the model `wanted` (`families.architecture`).

    None when the folder holds no checkpoint, or one whose arguments cannot be read: whoever loads it says why.

    Raises:
        DataError: the checkpoint is of another model; says in what it differs from `wanted`, which is what `source` says.
    """
    saved = saved_arguments(folder)
    differences = [] if saved is None else differing(saved, wanted)
    if differences:
        raise DataError(f"{folder} holds another model than {source}: {', '.join(differences)}")
    return saved


def differing(saved: argparse.Namespace, wanted: Mapping[str, Any]) -> list[str]:
    """Each argument that both name and that differs, with both values."""
    found: dict[str, Any] = {name: getattr(saved, SAVED_NAMES.get(name, name), None) for name in wanted}
    if not getattr(saved, "group_query_attention", True):
        found["num_query_groups"] = saved.num_attention_heads
    return [
        f"{flag_of(name)} {found[name]} there, {value} here"
        for name, value in wanted.items()
        if found[name] is not None and found[name] != value
    ]


def saved_arguments(folder: Path) -> argparse.Namespace | None:
    """Megatron's arguments as `folder`'s latest checkpoint keeps them, None when there are none to be read."""
    try:
        saved: argparse.Namespace = dist_checkpointing.load_common_state_dict(str(weights_folder(folder)))["args"]
        return saved
    except (Exception, CheckpointException):  # what it is depends on where the damage is; torch's own is no Exception
        return None


def describe_rounding(source: torch.dtype, dtype: torch.dtype) -> str | None:
    """What to tell the user when a checkpoint's weights, of `source`, have more precision than `dtype`."""
    return f"rounds the checkpoint's {source} to {dtype}" if rounds(source, dtype) else None
