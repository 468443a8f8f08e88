"""The frozen reference model of DPO, and of GRPO with a KL penalty: the policy's architecture and shards, earlier weights.

Its weights are a second model on the device, or with --ref-offload lie in pinned host memory and are swapped into the
policy's own parameters for the reference pass: one copy of the weights less on the device, for three copies of them
over the bus per step.

They are kept next to the checkpoints, one folder for each time they changed: `reference/iter_0000000` is the initial
policy, later ones come from --ref-update-interval. A checkpoint of iteration i goes with the newest reference not after
i, so model, optimizer and reference are always of one moment, whichever checkpoint a run is resumed from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training.training import get_model
from torch import Tensor

from megatron_sip.checkpoints.checksums import write_checksums
from megatron_sip.checkpoints.folder import (
    REFERENCE_FOLDER,
    iteration_folders,
    needed_references,
    reference_folder,
)
from megatron_sip.errors import DataError
from megatron_sip.files import move_into_place
from megatron_sip.model.gpt import model_provider


class Reference(Protocol):
    """Weights to compare the policy with."""

    def active(self, *, keep_changes: bool = False) -> AbstractContextManager[list[Any]]:
        """Model chunks, in evaluation mode, that have the reference's weights until the context ends.

        The policy must not be used meanwhile. With `keep_changes` what is written into them becomes the reference.
        """

    def copy_policy(self) -> None:
        """Make the reference's weights equal to the policy's."""


def build_reference(policy: list[Any], *, offload: bool = False) -> Reference:
    """The reference of `policy` (this rank's model chunks), equal to it for now; `offload` keeps it in host memory."""
    reference: Reference = OffloadedReference(policy) if offload else ResidentReference(policy)
    reference.copy_policy()
    return reference


class ResidentReference:
    """A second model without gradients and optimizer."""

    def __init__(self, policy: list[Any]) -> None:
        self._policy = policy
        self._chunks = get_model(model_provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
        for chunk in self._chunks:
            chunk.eval()
            chunk.requires_grad_(False)

    @contextmanager
    def active(self, *, keep_changes: bool = False) -> Iterator[list[Any]]:
        """The second model."""
        yield self._chunks

    def copy_policy(self) -> None:
        """Copy on the device."""
        _copy(_parameters(self._policy), _parameters(self._chunks))


class OffloadedReference:
    """Weights in host memory (pinned with a GPU), swapped with the policy's for the time of a reference pass."""

    def __init__(self, policy: list[Any]) -> None:
        self._policy = policy
        self._weights, self._swapped_out = ([_on_host(p) for p in _parameters(policy)] for _ in range(2))

    @contextmanager
    def active(self, *, keep_changes: bool = False) -> Iterator[list[Any]]:
        """The policy itself under the reference's weights; it gets its own back, bit for bit, also after an error."""
        parameters = _parameters(self._policy)
        _copy(parameters, self._swapped_out)
        _copy(self._weights, parameters)
        was_training = [chunk.training for chunk in self._policy]
        for chunk in self._policy:
            chunk.eval()
        try:
            yield self._policy
            if keep_changes:
                _copy(parameters, self._weights)
        finally:
            _copy(self._swapped_out, parameters)
            for chunk, training in zip(self._policy, was_training, strict=True):
                chunk.train(training)

    def copy_policy(self) -> None:
        """Copy to the host."""
        _copy(_parameters(self._policy), self._weights)


def _parameters(chunks: list[Any]) -> list[Tensor]:
    return [parameter.data for chunk in unwrap_model(chunks) for parameter in chunk.parameters()]


def _on_host(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)  # one stream: later copies and kernels wait for it


class ReferenceStore:
    """Reference weights on disk, below the checkpoint folder."""

    def __init__(self, save: Path) -> None:
        self._checkpoints = save
        self._folder = save / REFERENCE_FOLDER

    def save(self, reference: Reference, iteration: int) -> None:
        """Write the reference as of `iteration`; the folder appears only when it is complete.

        Those that no checkpoint goes with any more are removed.
        """
        final = self._folder / f"iter_{iteration:07d}"
        staged = self._folder / f"staged_{iteration:07d}"
        if dist.get_rank() == 0:
            for stale in (final, staged):
                shutil.rmtree(stale, ignore_errors=True)
            staged.mkdir(parents=True)
        dist.barrier()
        with reference.active() as chunks:
            dist_checkpointing.save(_sharded(chunks), str(staged), TorchDistSaveShardedStrategy())
        write_checksums(staged, dist.get_rank())
        dist.barrier()
        if dist.get_rank() == 0:
            move_into_place(staged, final)
            found = iteration_folders(self._folder)
            for stale_iteration in set(found) - needed_references(found, iteration_folders(self._checkpoints)):
                shutil.rmtree(found[stale_iteration])
        dist.barrier()

    def forget_after(self, iteration: int) -> None:
        """Remove references newer than the checkpoint that is resumed: they are of a run that never was."""
        if dist.get_rank() == 0:
            for saved, folder in iteration_folders(self._folder).items():
                if saved > iteration:
                    shutil.rmtree(folder)
        dist.barrier()

    def load(self, reference: Reference, iteration: int) -> None:
        """Load the newest reference not after `iteration`.

        Raises:
            DataError: there is none, as in a run whose objective had no reference so far.
        """
        folder = reference_folder(self._checkpoints, iteration)
        if folder is None:
            raise DataError(
                f"{self._folder}: no reference weights of iteration {iteration} or before, so the run had no "
                "objective with a reference (--objective dpo, or grpo with --grpo-kl-coef) until now: continue it with the "
                f"objective it had, or start a new run from its weights with --pretrained-checkpoint {self._checkpoints} and "
                "another --save folder"
            )
        with reference.active(keep_changes=True) as chunks:
            loaded = dist_checkpointing.load(_sharded(chunks), str(folder))
            for index, chunk in enumerate(unwrap_model(chunks)):
                chunk.load_state_dict(loaded[f"model{index}"])


def _sharded(chunks: list[Any]) -> dict[str, Any]:
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(unwrap_model(chunks))}
