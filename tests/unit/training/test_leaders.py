"""Which groups the ranks of a large run make for what they tell each other, and what those cost in sockets and in the store."""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sip.platform.megatron import prepare_megatron

prepare_megatron()  # before anything imports Megatron

from megatron.core import parallel_state  # noqa: E402

from megatron_sip.training import leaders  # noqa: E402

WORLD = 1024
TIMEOUT = timedelta(seconds=60)


@contextmanager
def fake_ranks(rank: int, tensor: int, pipeline: int) -> Iterator[None]:
    """This process as one of WORLD ranks of Megatron's, without any other."""
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def groups_of(rank: int, tensor: int, pipeline: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ranks of each group that this rank makes for the exchange."""
    made: list[list[int]] = []
    with fake_ranks(rank, tensor, pipeline), monkeypatch.context() as patch:
        patch.setattr(leaders, "gloo_group", lambda ranks, timeout: made.append(ranks))
        leaders.LeaderExchange(60)
    return made


def peers(size: int) -> int:
    """The most ranks that one is connected with in a group of `size`: a ring's neighbours, and those of a tree."""
    return min(size - 1, 2 + 2 * math.ceil(math.log2(size)))


def operations(size: int) -> int:
    """Of the store, by all ranks of a group of `size`: each tells its address once, and asks for those of its peers."""
    return size * (1 + 2 * peers(size))


@pytest.mark.parametrize(("tensor", "pipeline", "sockets", "asked"), [(8, 4, 24, 26), (8, 1, 23, 20), (1, 1, 22, 46)])
def test_of_1024_ranks_each_is_connected_with_tens_and_asks_the_store_tens_of_times(
    tensor: int, pipeline: int, sockets: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of all, another of all leaders and one call a replica: 1,023 sockets a rank, 2 million operations."""
    size = tensor * pipeline
    last = WORLD // size - 1
    stride = WORLD // pipeline  # Megatron's order: tensor, data, pipeline
    in_replica = [last * tensor + stage * stride + i for stage in range(pipeline) for i in range(tensor)]
    made = groups_of(in_replica[0], tensor, pipeline, monkeypatch)
    assert made == [in_replica, [replica * tensor for replica in range(last + 1)]]
    assert sum(peers(len(group)) for group in made) <= sockets
    assert operations(len(made[0])) * (last + 1) + operations(len(made[1])) <= asked * WORLD
    if size > 1:
        assert groups_of(in_replica[-1], tensor, pipeline, monkeypatch) == [in_replica]


class CountingStore(dist.Store):
    """One rank's way to a store that all share."""

    def __init__(self, shared: dist.Store) -> None:
        super().__init__()
        self.shared = shared
        self.calls: Counter[str] = Counter()

    def set(self, key: str, value: Any) -> None:
        self.calls["set"] += 1
        self.shared.set(key, value)

    def get(self, key: str) -> bytes:
        self.calls["get"] += 1
        return self.shared.get(key)

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:
        self.calls["wait"] += 1
        self.shared.wait(keys, timeout)


def sockets() -> int:
    """Open in this process."""
    return sum(link.is_symlink() and "socket" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir())


def on_all(size: int, action: Callable[[int], object]) -> None:
    threads = [threading.Thread(target=action, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("size", [2, 8, 16])
def test_a_group_connects_the_ranks_that_speak_with_each_other_alone(size: int) -> None:
    """All ranks of a real group, as threads: what objects are exchanged by is a gathering and a broadcast."""
    shared = dist.HashStore()
    stores = [CountingStore(shared) for _ in range(size)]
    groups: list[Any] = [None] * size

    def make(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(stores[rank], rank, size, TIMEOUT)

    def exchange(rank: int) -> None:
        gathered = [torch.zeros(1) for _ in range(size)]
        groups[rank].allgather([gathered], [torch.tensor([float(rank)])]).wait()
        told = torch.stack(gathered) if rank == 0 else torch.zeros(size, 1)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        groups[rank].broadcast([told], options).wait()
        assert told.flatten().tolist() == list(range(size))

    before = sockets()
    with leaders.connected_when_used():
        on_all(size, make)
    assert [store.calls for store in stores] == [Counter(set=1)] * size
    listening = sockets() - before
    assert listening == size
    on_all(size, exchange)
    on_all(size, exchange)
    assert sockets() - before - listening <= size * peers(size)
    assert max(store.calls["get"] for store in stores) <= peers(size)
    assert all(store.calls["wait"] == store.calls["get"] for store in stores)


def test_torch_s_switch_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(leaders.LAZY_INIT, raising=False)
    with leaders.connected_when_used():
        assert os.environ[leaders.LAZY_INIT] == "1"
    assert leaders.LAZY_INIT not in os.environ
    monkeypatch.setenv(leaders.LAZY_INIT, "0")
    with leaders.connected_when_used():
        pass
    assert os.environ[leaders.LAZY_INIT] == "0"
