"""Bring the trainer's weights to the SGLang engines after a step, and prove that they arrived: what every way has in common.

    sync = DistributedWeightSync(urls, SyncRank(source=True, lead=True), SyncSettings(backend="nccl"))
    sync.connect()
    failed = sync.push(export_hf_weights(model, hf_config), version="17")

`push` is collective: every trainer rank calls it and consumes its own export iterator, which yields (name, tensor) on
the rank that owns a tensor (tensor-parallel rank 0 of its pipeline stage), the stage's *source*, and (name, None)
elsewhere. One rank, the *lead*, opens and closes the update and checks each engine's version; the prefix caches, whose KV
belongs to the old weights, are flushed with it. `sync_distributed` broadcasts, `sync_disk` writes a folder.

An engine that fails in a push gets no new version, so that a client that asks for the new one never uses it; the next
push tries it again, and thereby brings it back.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_sip.hf.shards import NamedTensors
from megatron_sip.rollout.handshake import WeightSyncError, end_open_update
from megatron_sip.rollout.weight_group import SyncSettings
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError

log = logging.getLogger(__name__)


def only_rank(value: Any) -> list[Any]:
    """`SyncRank.exchange` of a trainer with one rank."""
    return [value]


@dataclass(frozen=True, slots=True)
class SyncRank:
    """This trainer rank's part in a push.

    Exactly one rank is `lead`; `source` are those whose iterators yield tensors, one in each of the pipeline's `stages`.
    `exchange` gives every rank the list of all ranks' values (all_gather_object); it must be called by all ranks together.
    """

    source: bool = True
    lead: bool = True
    stage: int = 0
    stages: int = 1
    exchange: Callable[[Any], list[Any]] = only_rank

    @property
    def name(self) -> str:
        """Unique among the sources."""
        return f"stage{self.stage}"


class WeightSync(ABC):
    """How weights travel. The order of the steps of a push is fixed here; subclasses say how the tensors go."""

    def __init__(self, urls: Sequence[str], rank: SyncRank, settings: SyncSettings) -> None:
        if not urls:
            raise ValueError("weight sync needs at least one engine URL")
        self.urls = [url.rstrip("/") for url in urls]
        self.rank = rank
        self.settings = settings
        self._unsynced: frozenset[str] = frozenset()  # the engines that the last push did not reach

    @abstractmethod
    def connect(self) -> None:
        """Prepare, collectively: also ends what a killed trainer left open in an engine, so push before sampling.

        Raises WeightSyncError when an engine cannot be reached.
        """

    @abstractmethod
    def push(self, named_tensors: NamedTensors, version: str, *, require_all: bool = True) -> dict[str, str]:
        """Send all weights as `version`, collectively. Raises WeightSyncError.

        Returns the engines that failed, by URL, and why: with `require_all` False some may, as long as one takes the weights.
        Also on failure every rank consumes its iterator to the end, so that no collective inside it is left waiting.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what `connect` made. Safe to repeat."""

    def _on_engines(
        self, action: Callable[[str], object], failed: Mapping[str, str], active: bool = True
    ) -> dict[str, str]:
        """Run `action` on all engines not in `failed`, at once; then every rank's failures (url: reason) merged.

        Ranks that are not `active` only take part in the exchange.
        """
        found: dict[str, str] = {}
        urls = [url for url in self.urls if url not in failed] if active else []
        if urls:
            with ThreadPoolExecutor(len(urls), thread_name_prefix="weight-sync") as threads:
                for url, future in [(url, threads.submit(action, url)) for url in urls]:
                    if error := future.exception():
                        found[url] = reason(error)
        return self._agree({**failed, **found})

    def _in_turns(
        self, action: Callable[[dict[str, str]], dict[str, str]], failed: dict[str, str]
    ) -> tuple[dict[str, str], Exception | None]:
        """Run `action` on the ranks of one pipeline stage after the other; also what it raised on this rank.

        It gets the engines that failed (url: reason) by what all stages before said, and returns those that failed by now:
        an engine that one stage gave up on may still be busy with it, and gets nothing from the next.
        """
        error: Exception | None = None
        for stage in range(self.rank.stages):
            if stage == self.rank.stage:
                try:
                    failed = action(failed)
                except Exception as raised:
                    error = raised
            failed = self._agree(failed)
        return failed, error

    def _agree(self, failed: Mapping[str, str]) -> dict[str, str]:
        merged: dict[str, str] = {}
        for other in self.rank.exchange(dict(failed)):
            merged.update(other)
        return merged

    def _raise_on_errors(self, error: BaseException | None) -> None:
        errors = [message for message in self.rank.exchange(None if error is None else repr(error)) if message]
        if error is not None:
            raise error
        if errors:
            raise WeightSyncError(f"another trainer rank could not export its weights: {errors[0]}")

    def _on_lead(self, action: Callable[[], object]) -> None:
        """Run `action` on the lead alone; what it raises ends the push on every rank, so that none waits for the lead."""
        error: BaseException | None = None
        if self.rank.lead:
            try:
                action()
            except Exception as raised:
                error = raised
        self._raise_on_errors(error)

    def _conclude(self, version: str, failed: dict[str, str], require_all: bool) -> dict[str, str]:
        if not (failed and require_all):
            if self.rank.lead:
                self._log_change(version, failed)
            self._unsynced = frozenset(failed)
        if failed and (require_all or len(failed) == len(self.urls)):
            reasons = "; ".join(f"{url}: {reason}" for url, reason in failed.items())
            raise WeightSyncError(f"weights of version {version!r} did not reach {len(failed)} engine(s): {reasons}")
        return failed

    def _log_change(self, version: str, failed: Mapping[str, str]) -> None:
        lost = [f"{url} ({reason})" for url, reason in failed.items() if url not in self._unsynced]
        back = sorted(self._unsynced.difference(failed))
        if lost:
            left = f"{len(failed)} of {len(self.urls)} engines are left out until they take weights again"
            log.warning("weights of version %s did not reach %s; %s", version, "; ".join(lost), left)
        if back:
            log.warning("weights of version %s reached engines that had missed some: %s", version, ", ".join(back))

    def _recover(self, url: str) -> None:
        end_open_update(url, self.settings.timeout_s, self.settings.key)

    def _call(self, url: str, path: str, body: Any = None, timeout_s: float = 0.0) -> Any:
        limit = timeout_s or self.settings.call_timeout_s
        return call(url, "POST", path, body or {}, timeout_s=limit, key=self.settings.key)

    def _verify(self, url: str, version: str) -> None:
        info = call(url, "GET", "/model_info", timeout_s=self.settings.call_timeout_s, key=self.settings.key)
        found = info.get("weight_version") if isinstance(info, dict) else None
        if found != version:
            raise RequestError("stale-weights", f"{url}: reports weight version {found!r} after a push of {version!r}")


def reason(error: BaseException) -> str:
    """Why an engine is left out, for people."""
    return str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"


@contextmanager
def drained(iterator: Iterator[Any]) -> Iterator[None]:
    """Consume what is left of `iterator` when the body fails: the other ranks wait in its collectives."""
    try:
        yield
    except Exception:
        for _ in iterator:
            pass
        raise
