"""What ranks tell each other about a step, as plain objects over gloo.

Leaders (the first tensor- and pipeline-parallel rank of each replica) make experience; everyone trains on all of it.
Waiting happens on gloo groups with a long time-out: a leader may wait minutes for its judge, and must not trip NCCL's
watchdog or keep a GPU spinning.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state


class LeaderExchange:
    """Collectives over plain objects: of the leaders, of one replica's ranks, and of all ranks."""

    def __init__(self, timeout_seconds: float) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        self.is_leader = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_pipeline_model_parallel_rank() == 0
        )
        self.replica = parallel_state.get_data_parallel_rank()
        self.num_replicas = parallel_state.get_data_parallel_world_size()
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, (self.replica, self.is_leader))
        leaders = [rank for rank, (_, is_leader) in enumerate(places) if is_leader]
        self._leaders = sorted(leaders, key=lambda rank: places[rank][0])
        self._leader_group = gloo_group(self._leaders, timeout)
        for replica in range(self.num_replicas):
            group = gloo_group([rank for rank, place in enumerate(places) if place[0] == replica], timeout)
            if replica == self.replica:
                self._replica_group = group
        self._everyone = gloo_group(list(range(len(places))), timeout)

    def all_gather_from_leaders(self, mine: Any) -> list[Any]:
        """The leaders' objects in order of replica, on every rank; `mine` is ignored on other ranks."""
        gathered: list[Any] = [None] * self.num_replicas
        if self.is_leader:
            dist.all_gather_object(gathered, mine, group=self._leader_group)
        box = [gathered]
        dist.broadcast_object_list(box, src=self._leaders[self.replica], group=self._replica_group)
        return box[0]

    def all_gather_in_replica(self, mine: Any) -> list[Any]:
        """`mine` of every rank of this replica, on all of them."""
        gathered: list[Any] = [None] * dist.get_world_size(self._replica_group)
        dist.all_gather_object(gathered, mine, group=self._replica_group)
        return gathered

    def all_gather(self, mine: Any) -> list[Any]:
        """`mine` of every rank, on every rank."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine, group=self._everyone)
        return gathered

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        vote = torch.tensor([int(flag)])
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._everyone)
        return bool(vote.item())

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self._everyone)

    def all_gather_from_last_stages(self, mine: Any) -> list[Any]:
        """`mine` of the last pipeline stage of every replica, on every rank (one tensor-parallel rank speaks)."""
        speaks = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        return [part for part in self.all_gather(mine if speaks else None) if part is not None]


def gloo_group(ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    """A gloo group of `ranks`; every rank of the job must call this, members or not."""
    return cast("dist.ProcessGroup", dist.new_group(ranks, timeout=timeout, backend="gloo"))
