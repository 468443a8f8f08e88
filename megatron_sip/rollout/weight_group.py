"""A process group of one trainer rank and the ranks of one SGLang engine, over which weights are broadcast.

The group stands beside torch.distributed's default group, which belongs to Megatron: it is a bare gloo or NCCL
backend on a store of its own, registered nowhere. One group per engine rather than one for all: an engine that hangs
or dies then spoils only its own group. The price is that the weights leave the trainer once for each engine, which the
trainer's replicas share out among them (docs/slurm.md says what that costs); a replica's sources (one per pipeline
stage) take turns.

NCCL makes a group's communicator in its first broadcast, which blocks, without any time-out, until the engine has
entered it too. So every call that can block for ever runs in a daemon thread, and is given up at the deadline.
"""

from __future__ import annotations

import os
import socket
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_sip.hf.shards import Tensors
from megatron_sip.rollout.daemon import in_daemon_thread
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError

Backend = Literal["gloo", "nccl"]
POLL_S = 0.001
ABORT_S = 5.0
NCCL_WITHOUT_WATCHDOG = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """`address`: this host's address as the engines see it.

    `timeout_s` bounds what moves weights (a join, a broadcast, a load from disk), `control_timeout_s` every other call
    to an engine, so that one that hangs delays a push by this much; connections are given up earlier
    (`blocking_call.CONNECT_S`). `key` is what the engines demand as a bearer token.
    """

    backend: Backend = "gloo"
    address: str = "127.0.0.1"
    bucket_bytes: int = 512 * 2**20
    timeout_s: float = 120.0
    control_timeout_s: float = 60.0
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if min(self.bucket_bytes, self.timeout_s, self.control_timeout_s) <= 0:
            raise ValueError(
                "bucket_bytes, timeout_s and control_timeout_s must be positive, not "
                f"{self.bucket_bytes}, {self.timeout_s}, {self.control_timeout_s}"
            )

    @property
    def call_timeout_s(self) -> float:
        """Seconds for a call that moves no weights."""
        return min(self.timeout_s, self.control_timeout_s)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors of a model, laid end to end in one uint8 tensor in the order of `names`."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    data: torch.Tensor


def make_bucket(tensors: Tensors, device: torch.device) -> Bucket:
    """Flatten named tensors of any dtypes into one bucket on `device`.

    Wide dtypes come first, so that every tensor starts at a multiple of its item size, which the receiver requires.
    """
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    flat = [tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8) for _, tensor in ordered]
    return Bucket(
        names=tuple(name for name, _ in ordered),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered),
        shapes=tuple(tuple(tensor.shape) for _, tensor in ordered),
        data=torch.cat(flat),
    )


class EngineGroup:
    """The group with one engine; this trainer rank is its rank 0. Not thread-safe: one thread at a time uses it."""

    def __init__(self, url: str, source: str, settings: SyncSettings) -> None:
        self.url = url
        self._source = source
        self._settings = settings
        self._name: str | None = None
        self._group: Any = None
        self._ranks = 0  # of the engine
        self._startup_time: Any = None
        self.used = False
        """Whether a broadcast went through: NCCL has its communicator."""
        # A broken gloo group waits for its pending work when it is freed; it must not do so in the training loop.
        self._broken: list[Any] = []

    @property
    def joined(self) -> bool:
        return self._group is not None

    def check(self) -> None:
        """Ask the engine how many ranks it has, and leave the group that was joined with a process that is no more."""
        info = call(self.url, "GET", "/server_info", timeout_s=self._settings.call_timeout_s, key=self._settings.key)
        if not isinstance(info, dict) or type(ranks := info.get("tp_size", 1)) is not int:
            raise RequestError("bad-response", f"{self.url}/server_info is none: {str(info)[:200]}")
        if info.get("startup_time") != self._startup_time:
            self.leave(tell_engine=False)
        self._ranks, self._startup_time = ranks, info.get("startup_time")

    def broadcast(self, bucket: Bucket) -> None:
        """Have the engine load a bucket. Raises RequestError, after which the group is gone and must be joined anew."""
        body = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        deadline = time.monotonic() + self._settings.timeout_s
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            # The engine only enters the broadcast once it has the request, so both must be under way together.
            request = self._request("/update_weights_from_distributed", body)
            entry = in_daemon_thread(partial(self._group.broadcast, [bucket.data], options), "weight-sync-broadcast")
            self._await(entry, request, deadline)
            request.result(timeout=max(1.0, deadline - time.monotonic()))
            self.used = True
        except Exception as error:
            self._abandon()
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                "connection", f"{self.url}: weight broadcast failed: {error or type(error).__name__}"
            ) from error

    def leave(self, tell_engine: bool = True) -> None:
        """Forget the group here and, best effort, in the engine."""
        if self._group is None:
            return
        name = self._name
        self._abandon()
        if tell_engine:
            try:
                body = {"group_name": name}
                call(self.url, "POST", "/destroy_weights_update_group", body, timeout_s=10.0, key=self._settings.key)
            except RequestError:
                return  # an engine that is gone has no group either

    def join(self) -> None:
        """Make the group, after `check`. Raises RequestError."""
        engine_ranks = self._ranks
        timeout = timedelta(seconds=self._settings.timeout_s)
        store = listening_store(self._settings.address, timeout)
        name = f"sip-{self._source}-{uuid.uuid4().hex[:8]}"
        body = {
            "master_address": self._settings.address,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": 1 + engine_ranks,
            "group_name": name,
            "backend": self._settings.backend,
        }
        request = self._request("/init_weights_update_group", body)
        ours = in_daemon_thread(
            partial(backend_group, store, name, self._settings.backend, 1 + engine_ranks, timeout), "weight-sync-join"
        )
        done, waiting = wait((request, ours), timeout=self._settings.timeout_s + 5, return_when=FIRST_EXCEPTION)
        try:
            for future in (request, ours):
                if future in done:
                    future.result()
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(
                "connection", f"{self.url}: no weight group at {self._settings.address}: {error}"
            ) from error
        if waiting:
            raise RequestError("timeout", f"{self.url}: no weight group within {self._settings.timeout_s:g} s")
        self._group = ours.result()
        self._name = name

    def _request(self, path: str, body: dict[str, Any]) -> Future[Any]:
        return in_daemon_thread(
            partial(call, self.url, "POST", path, body, timeout_s=self._settings.timeout_s, key=self._settings.key),
            "weight-sync-http",
        )

    def _await(self, entry: Future[Any], request: Future[Any], deadline: float) -> None:
        """Return when the broadcast is entered and done; raise at the deadline, or at once what the request raised."""
        while not (entry.done() and entry.result().is_completed()):
            if request.done() and request.exception() is not None:
                request.result()
            if time.monotonic() > deadline:
                raise RequestError("timeout", f"{self.url}: took no weights within {self._settings.timeout_s:g} s")
            time.sleep(POLL_S)
        # Raises what NCCL found, and aborts the communicator first, which may block.
        in_daemon_thread(entry.result().wait, "weight-sync-end").result(timeout=max(1.0, deadline - time.monotonic()))

    def _abandon(self) -> None:
        if self._group is not None:
            # Closes the connection, which wakes an engine that still waits for our broadcast. Best effort: a
            # communicator that is still being made can block its abort as well.
            wait([in_daemon_thread(self._group.abort, "weight-sync-abort")], timeout=ABORT_S)
            self._broken.append(self._group)
        self._group = self._name = None
        self.used = False


def listening_store(address: str, timeout: timedelta) -> dist.TCPStore:
    """A store that listens at `address` alone, on a free port: by itself it would on all interfaces."""
    with socket.create_server((address, 0)) as listener:
        port, descriptor = listener.getsockname()[1], listener.detach()  # the store closes it
    return dist.TCPStore(
        *(address, port),
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        use_libuv=True,
        master_listen_fd=descriptor,
    )


def backend_group(store: dist.TCPStore, name: str, backend: Backend, world_size: int, timeout: timedelta) -> Any:
    """Rank 0's side of the group that SGLang makes with torch's process-group helper: the store prefixes are its."""
    device = "cpu" if backend == "gloo" else "cuda"
    prefixed = dist.PrefixStore(f"{device}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))
    if backend == "gloo":
        return dist.ProcessGroupGloo(prefixed, 0, world_size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout * 10  # we give up ourselves, earlier
    with errors_returned():
        return dist.ProcessGroupNCCL(prefixed, 0, world_size, options)


@contextmanager
def errors_returned() -> Iterator[None]:
    """Make NCCL groups without a watchdog: `is_completed` then finds a failed broadcast, and `wait` raises it.

    The watchdog's thread ends the process when an engine dies, by its own exception or, where that is switched off (by
    TORCH_NCCL_ASYNC_ERROR_HANDLING=2), minutes later by the monitor of the default group, which one flag tells of any
    group's error. ProcessGroupNCCL reads the environment while it is made, and has no option for it; Megatron's groups keep
    their watchdogs.
    """
    before = os.environ.get(NCCL_WITHOUT_WATCHDOG)
    os.environ[NCCL_WITHOUT_WATCHDOG] = "1"
    try:
        yield
    finally:
        os.environ.pop(NCCL_WITHOUT_WATCHDOG)
        if before is not None:
            os.environ[NCCL_WITHOUT_WATCHDOG] = before


def address_for(urls: Sequence[str]) -> str:
    """This host's address as all servers at `urls` see it: one of this host reaches that of an interface, too."""
    addresses = [address_towards(url) for url in urls]
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])


def address_towards(url: str) -> str:
    """This host's address as the server at `url` sees it: that of the interface packets to it leave through."""
    target = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target.hostname, target.port or 80))  # a datagram socket sends nothing here
        return str(probe.getsockname()[0])
