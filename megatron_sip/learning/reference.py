"""The frozen reference model of DPO: a second copy of the policy without gradients or optimizer.

Its weights are kept next to the checkpoints, one folder for each time they changed: `reference/iter_0000000` is the
initial policy, later ones come from --ref-update-interval. A checkpoint of iteration i goes with the newest reference
not after i, so model, optimizer and reference are always of one moment, whichever checkpoint a run is resumed from.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training.training import get_model

from megatron_sip.model.gpt import model_provider

FOLDER = "reference"


def build_reference() -> list[Any]:
    """The reference's model chunks: same shards as the policy, frozen, in evaluation mode."""
    reference = get_model(model_provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
    for chunk in reference:
        chunk.eval()
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
    return reference


@torch.no_grad()
def copy_policy(policy: list[Any], reference: list[Any]) -> None:
    """Make the reference's weights equal to the policy's."""
    for source, target in zip(unwrap_model(policy), unwrap_model(reference), strict=True):
        weights = dict(source.named_parameters())
        for name, parameter in target.named_parameters():
            parameter.copy_(weights[name])


class ReferenceStore:
    """Reference weights on disk, below the checkpoint folder."""

    def __init__(self, save: Path) -> None:
        self._folder = save / FOLDER

    def save(self, reference: list[Any], iteration: int) -> None:
        """Write the reference as of `iteration`; the folder appears only when it is complete."""
        final = self._folder / f"iter_{iteration:07d}"
        staged = self._folder / f"staged_{iteration:07d}"
        if dist.get_rank() == 0:
            for stale in (final, staged):
                shutil.rmtree(stale, ignore_errors=True)
            staged.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(_sharded(reference), str(staged), TorchDistSaveShardedStrategy())
        dist.barrier()
        if dist.get_rank() == 0:
            staged.rename(final)
        dist.barrier()

    def forget_after(self, iteration: int) -> None:
        """Remove references newer than the checkpoint that is resumed: they are of a run that never was."""
        if dist.get_rank() == 0:
            for newer in self._iterations():
                if newer > iteration:
                    shutil.rmtree(self._folder / f"iter_{newer:07d}")
        dist.barrier()

    def load(self, reference: list[Any], iteration: int) -> int:
        """Load the newest reference not after `iteration`; returns the iteration it is of.

        Raises:
            FileNotFoundError: there is none.
        """
        found = [i for i in self._iterations() if i <= iteration]
        if not found:
            raise FileNotFoundError(f"{self._folder}: no reference weights of iteration {iteration} or before")
        newest = max(found)
        sharded = _sharded(reference)
        loaded = dist_checkpointing.load(sharded, str(self._folder / f"iter_{newest:07d}"))
        for index, chunk in enumerate(unwrap_model(reference)):
            chunk.load_state_dict(loaded[f"model{index}"])
        return newest

    def _iterations(self) -> list[int]:
        names = [path.name for path in self._folder.glob("iter_*")] if self._folder.exists() else []
        return [int(match.group(1)) for name in names if (match := re.fullmatch(r"iter_(\d+)", name))]


def _sharded(reference: list[Any]) -> dict[str, Any]:
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(unwrap_model(reference))}
