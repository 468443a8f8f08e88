"""Weights that are broadcast to the engines, bucket by bucket; nothing touches a disk.

Each source sends its tensors to every engine of its replica's itself: one group for each (source, engine) pair, because
relaying all stages through one rank would cost another copy over the network. The next bucket is gathered while one flies. An
engine whose group is
lost, or that is another process than before (its start-up time differs), is joined again by the next push.

Sources take turns, one pipeline stage after the other, and an engine hears of one of them at a time. Groups are made one
after the other, and so is the first broadcast in each, in which NCCL makes its communicator: two that are made at once,
in an order that each side chooses for itself, can wait for each other for ever. (That broadcast carries a stage's first
bucket and no probe, since an engine takes none outside an update, and no tensor that its model does not know.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_sip.hf.shards import NamedTensors, buckets
from megatron_sip.rollout.handshake import WeightSyncError
from megatron_sip.rollout.weight_group import EngineGroup, SyncSettings, make_bucket
from megatron_sip.rollout.weight_sync import SyncRank, WeightSync, drained, reason
from megatron_sip.serving.failures import RequestError

REOPEN_S = 5.0


class DistributedWeightSync(WeightSync):
    """Broadcasts over gloo or NCCL, bucket by bucket; nothing touches a disk."""

    def __init__(self, urls: Sequence[str], rank: SyncRank, settings: SyncSettings) -> None:
        super().__init__(urls, rank, settings)
        if settings.backend == "nccl" and not torch.cuda.is_available():
            raise ValueError("weight sync over nccl needs a GPU in the trainer; use gloo, or disk")
        self._device = torch.device("cuda" if settings.backend == "nccl" else "cpu")
        self._groups = {url: EngineGroup(url, rank.name, settings) for url in self.urls}

    def connect(self) -> None:
        failed = self._on_engines(self._recover, {}, self.rank.lead)
        failed = self._join(failed)
        if failed:
            raise WeightSyncError("; ".join(failed.values()))

    def push(self, named_tensors: NamedTensors, version: str, *, require_all: bool = True) -> dict[str, str]:
        iterator = iter(named_tensors)
        failed = self._on_engines(self._open, {}, self.rank.lead)
        failed = self._join(failed)
        failed, error = self._in_turns(lambda failed: self._stream(iterator, failed), failed)
        # Engines that failed, or all when the export broke, are closed too, but without the new version.
        broken = self.rank.exchange(error is not None)
        complete = not any(broken)
        failed = self._on_engines(lambda url: self._close(url, version if complete else None), failed, self.rank.lead)
        if self.rank.lead and failed:
            with ThreadPoolExecutor(len(failed), thread_name_prefix="weight-sync") as threads:
                list(threads.map(self._reopen, failed))
        self._raise_on_errors(error)
        return self._conclude(version, failed, require_all)

    def close(self) -> None:
        for group in self._groups.values():
            group.leave()

    def _join(self, failed: dict[str, str]) -> dict[str, str]:
        failed = self._on_engines(lambda url: self._groups[url].check(), failed, self.rank.source)
        failed, _ = self._in_turns(self._join_missing, failed)
        return failed

    def _join_missing(self, failed: dict[str, str]) -> dict[str, str]:
        for url, group in self._groups.items():
            if self.rank.source and url not in failed and not group.joined:
                try:
                    group.join()
                except Exception as error:
                    failed = {**failed, url: reason(error)}
        return failed

    def _stream(self, iterator: Iterator[tuple[str, torch.Tensor | None]], failed: dict[str, str]) -> dict[str, str]:
        """Send this rank's tensors; returns the engines that failed by now."""
        with ThreadPoolExecutor(len(self.urls), thread_name_prefix="weight-sync") as threads, drained(iterator):
            flying: dict[str, Future[None]] = {}
            for tensors in buckets(iterator, self.settings.bucket_bytes):
                bucket = make_bucket(tensors, self._device)  # gathered while the one before flies
                failed = failed | lost(flying)
                live = [url for url in self.urls if url not in failed]
                unused = [url for url in live if not self._groups[url].used]
                for url in unused:
                    failed = failed | lost({url: threads.submit(self._groups[url].broadcast, bucket)})
                flying = {url: threads.submit(self._groups[url].broadcast, bucket) for url in live if url not in unused}
            return failed | lost(flying)

    def _open(self, url: str) -> None:
        self._call(url, "/pause_generation", {"mode": "retract"})
        try:
            self._call(url, "/begin_weight_update")
        except RequestError as error:
            if "already open" not in str(error):
                raise
            self._call(url, "/end_weight_update")  # left open by a trainer that died
            self._call(url, "/begin_weight_update")

    def _close(self, url: str, version: str | None) -> None:
        self._call(url, "/end_weight_update")
        self._call(url, "/flush_cache?timeout=10")
        if version is not None:
            self._call(url, "/update_weight_version", {"new_version": version, "abort_all_requests": False})
        self._call(url, "/continue_generation")
        if version is not None:
            self._verify(url, version)

    def _reopen(self, url: str) -> None:
        """Let an engine that failed answer again; it keeps its old version, so nobody takes its answers for new."""
        for path in ("/end_weight_update", "/flush_cache", "/continue_generation"):
            try:
                self._call(url, path, timeout_s=REOPEN_S)
            except RequestError as error:  # it failed before, and the reason is already reported
                if error.kind in ("connection", "disconnected"):
                    return


def lost(flying: Mapping[str, Future[None]]) -> dict[str, str]:
    """Wait for broadcasts, by their engine's URL; those that failed, and why."""
    return {url: str(error) for url, future in flying.items() if (error := future.exception())}
