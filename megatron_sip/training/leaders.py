"""What ranks tell each other about a step, as plain objects over gloo.

Leaders (the first tensor- and pipeline-parallel rank of each replica) make experience; everyone trains on all of it.
Waiting happens on gloo groups with a long time-out: a leader may wait minutes for its judge, and must not trip NCCL's
watchdog or keep a GPU spinning.

Two groups carry it all, whatever the number of ranks: a replica's ranks, and the leaders. What concerns everyone goes
through them, so that no rank is connected with all others, and each rank makes only the groups that it is in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from megatron.core import parallel_state

LAZY_INIT = "TORCH_GLOO_LAZY_INIT"


class LeaderExchange:
    """Collectives over plain objects: of the leaders, of one replica's ranks, and of all ranks."""

    def __init__(self, timeout_seconds: float) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        self.replica = parallel_state.get_data_parallel_rank()
        self.num_replicas = parallel_state.get_data_parallel_world_size()
        self._rank = dist.get_rank()
        in_replica = sorted(dist.get_process_group_ranks(parallel_state.get_model_parallel_group()))
        self._leader = in_replica[0]  # first by tensor and by pipeline: Megatron counts both upwards
        self.is_leader = self._rank == self._leader
        self._replica_group = gloo_group(in_replica, timeout)
        if self.is_leader:  # those of all replicas, in the order of these
            self._leader_group = gloo_group(
                dist.get_process_group_ranks(parallel_state.get_data_parallel_group()), timeout
            )

    def all_gather_from_leaders(self, mine: Any) -> list[Any]:
        """The leaders' objects in order of replica, on every rank; `mine` is ignored on other ranks."""
        gathered: list[Any] = [None] * self.num_replicas
        if self.is_leader:
            dist.all_gather_object(gathered, mine, group=self._leader_group)
        box = [gathered]
        dist.broadcast_object_list(box, src=self._leader, group=self._replica_group)
        return box[0]

    def all_gather_in_replica(self, mine: Any) -> list[Any]:
        """`mine` of every rank of this replica, on all of them."""
        gathered: list[Any] = [None] * dist.get_world_size(self._replica_group)
        dist.all_gather_object(gathered, mine, group=self._replica_group)
        return gathered

    def all_gather(self, mine: Any) -> list[Any]:
        """`mine` of every rank, in order of ranks, on every rank."""
        replicas = self.all_gather_from_leaders(self.all_gather_in_replica((self._rank, mine)))
        by_rank = dict(pair for replica in replicas for pair in replica)
        return [by_rank[rank] for rank in sorted(by_rank)]

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return any(self.all_gather_from_leaders(any(self.all_gather_in_replica(flag))))

    def barrier(self) -> None:
        """Wait for every rank."""
        self.any_rank(False)

    def all_gather_from_last_stages(self, mine: Any) -> list[Any]:
        """`mine` of the last pipeline stage of every replica, on every rank (one tensor-parallel rank speaks)."""
        speaks = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        return [part for part in self.all_gather(mine if speaks else None) if part is not None]


def gloo_group(ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    """A gloo group of `ranks`; only these call this."""
    # Torch counts groups a rank, and leaders make one more: a later dist.new_group of all ranks would name it differently on
    # each, and hang. Make such groups before these.
    with connected_when_used():
        group = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=True)
    return cast("dist.ProcessGroup", group)


@contextmanager
def connected_when_used() -> Iterator[None]:
    """Let gloo groups connect the ranks that speak with each other, when they first do, and not all of them at once.

    Gloo reads the environment while a group is made, and torch's constructors of groups have no option for it. A group in
    which others do not do so as well, as SGLang's, cannot be connected.
    """
    before = os.environ.get(LAZY_INIT)
    os.environ[LAZY_INIT] = "1"
    try:
        yield
    finally:
        os.environ.pop(LAZY_INIT)
        if before is not None:
            os.environ[LAZY_INIT] = before
