"""Megatron's checkpoints are written and read back without a process beside each rank."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sip.platform.megatron import prepare_megatron


@pytest.fixture
def only_rank() -> Iterator[None]:
    prepare_megatron()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, weight: torch.Tensor) -> None:
    folder.mkdir()
    dist_checkpointing.save({"weight": ShardedTensor.from_rank_offsets("weight", weight), "step": 3}, str(folder))


@pytest.mark.usefixtures("only_rank")
def test_a_save_starts_no_process_and_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    children = multiprocessing.active_children()
    for number in range(2):
        weight = torch.arange(6.0) + number
        save(tmp_path / str(number), weight)
        wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(6))}
        loaded = dist_checkpointing.load(wanted, str(tmp_path / str(number)))
        assert torch.equal(loaded["weight"], weight)
        assert loaded["step"] == 3
    assert multiprocessing.active_children() == children


@pytest.mark.usefixtures("only_rank")
def test_a_save_that_fails_says_so_and_the_next_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(filesystem_async, "_write_item", full)
        with pytest.raises(CheckpointException, match="OSError"):
            save(tmp_path / "full", torch.zeros(6))
    assert filesystem_async._results_queue is None
    save(tmp_path / "next", torch.zeros(6))
