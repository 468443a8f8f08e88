"""kill -9 of an engine inside a push: the trainer goes on with the others, and the engine's next process gets the weights."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import closing
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_engine import FakeEngine, digests, serve
from forks import forks
from ports import kept_port

from megatron_sip.rollout import weight_group
from megatron_sip.rollout.sync_distributed import DistributedWeightSync
from megatron_sip.rollout.weight_group import SyncSettings, backend_group
from megatron_sip.rollout.weight_sync import SyncRank, WeightSyncError

KILLS = 20


class MortalEngine:
    """A fake engine in a process, always at the same port."""

    def __init__(self) -> None:
        self._port = kept_port()
        self._context = forks()
        self.start()

    def start(self) -> None:
        self._asked: Connection
        self._asked, theirs = self._context.Pipe()
        self.process: BaseProcess = self._context.Process(target=serve, args=(self._port, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that its end ends a `recv` here
        self.url = self._asked.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def found(self) -> Any:
        self._asked.send("what do you have?")
        return self._asked.recv()


def tensors(step: int) -> dict[str, torch.Tensor]:
    """16 tensors of 256 KB, a bucket each."""
    return {f"layer.{number}": torch.full((64, 1024), step + number / 16) for number in range(16)}


def test_an_engine_killed_at_any_moment_of_a_push_costs_that_push_of_its_own_alone() -> None:
    moments = random.Random(4)
    mortal = MortalEngine()
    settings = SyncSettings(timeout_s=20.0, control_timeout_s=5.0, bucket_bytes=1 << 18)
    reached = 0
    with FakeEngine() as live, closing(DistributedWeightSync([live.url, mortal.url], SyncRank(), settings)) as sync:

        def push(step: int) -> dict[str, str]:
            return sync.push(tensors(step).items(), version=str(step), require_all=False)

        sync.connect()
        undisturbed = []
        for _ in range(3):  # the first connects as well, and any may have to wait for the machine
            started = time.monotonic()
            assert push(0) == {}
            undisturbed.append(time.monotonic() - started)
        seconds = min(undisturbed)
        for step in range(1, 2 * KILLS, 2):
            delay = moments.uniform(0.0, seconds)
            killer = threading.Timer(delay, mortal.process.kill)
            killer.start()
            started = time.monotonic()
            failed = push(step)
            assert time.monotonic() - started < 15.0
            killer.join()
            mortal.kill()
            assert set(failed) <= {mortal.url}
            reached += not failed
            assert live.version == str(step)
            mortal.start()
            assert push(step + 1) == {}
            expected = digests(tensors(step + 1))
            assert mortal.found() == (str(step + 1), expected)
            assert digests(live.weights) == expected
    mortal.kill()
    assert reached <= KILLS - 5  # kills came inside the push, most of them where the machine was quiet


class FailedBroadcast:
    """As NCCL's without a watchdog, when its peer has gone: done by the look of it, and `wait` says that it failed."""

    def broadcast(self, *_: Any) -> FailedBroadcast:
        return self

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        raise dist.DistBackendError("NCCL error: remote process exited or there was a network error")

    def abort(self) -> None:
        pass


def test_a_broadcast_that_failed_is_an_error_of_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_group, "backend_group", lambda *_: FailedBroadcast())
    with FakeEngine() as engine:
        engine.answers["/init_weights_update_group"] = 200, {"success": True}
        engine.answers["/update_weights_from_distributed"] = 200, {"success": True}
        sync = DistributedWeightSync([engine.url], SyncRank(), SyncSettings(timeout_s=5.0))
        with pytest.raises(
            WeightSyncError, match=f"{engine.url}: weight broadcast failed: NCCL error: remote process exited"
        ):
            sync.push(tensors(1).items(), version="1")
        assert engine.version == "default"


def test_groups_over_nccl_have_no_watchdog_that_ends_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two GPUs would have to prove: here, that the group is made as torch's source says, and nothing else is."""
    made: list[str | None] = []

    class Group:
        class Options:
            pass

        def __init__(self, *_: Any) -> None:
            made.append(os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group)
    store = weight_group.listening_store("127.0.0.1", timedelta(seconds=5))
    for before in (None, "0"):
        if before is not None:
            monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
        backend_group(store, "group", "nccl", 2, timedelta(seconds=5))
        assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == before
    assert made == ["1", "1"]
