"""Bring the trainer's weights to the SGLang engines after a step, and prove that they arrived.

    sync = DistributedWeightSync(urls, SyncRank(source=True, lead=True), SyncSettings(backend="nccl"))
    sync.connect()
    failed = sync.push(export_hf_weights(model, hf_config), version="17")

`push` is collective: every trainer rank calls it and consumes its own export iterator, which yields (name, tensor) on
the rank that owns a tensor (tensor-parallel rank 0 of its pipeline stage) and (name, None) elsewhere. That rank, the
stage's *source*, sends the tensor to all engines itself: one group for each (source, engine) pair, because relaying
all stages through one rank would cost another copy over the network. One rank, the *lead*, opens and closes the
update, flushes the prefix caches (their KV belongs to the old weights) and checks each engine's version.

An engine that fails in a push gets no new version, so that a client that asks for the new one never uses it; the next
push finds that its group is lost, or that it is another process than before (its start-up time differs), joins it
again, and thereby brings it back.

The sources send everything to each engine separately (`engine_group` says what that costs); DiskWeightSync writes it
once and leaves the distribution to the file system.
"""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sip.hf.folder import copy_hf_files
from megatron_sip.hf.shards import NamedTensors, Part, buckets, name_parts, write_parts
from megatron_sip.rollout.protocol import EngineError, WeightSyncError
from megatron_sip.rollout.recovery import end_open_update
from megatron_sip.rollout.weight_group import EngineGroup, SyncSettings, make_bucket
from megatron_sip.serving.blocking_call import call

log = logging.getLogger(__name__)

REOPEN_S = 5.0
KEPT_FOLDERS = 2
"""Of DiskWeightSync: engines may still read the newest."""


def only_rank(value: Any) -> list[Any]:
    """`SyncRank.exchange` of a trainer with one rank."""
    return [value]


@dataclass(frozen=True, slots=True)
class SyncRank:
    """This trainer rank's part in a push.

    Exactly one rank is `lead`; `source` are those whose iterators yield tensors. `name` is unique among the sources
    (for example "stage0"). `exchange` gives every rank the list of all ranks' values (all_gather_object); it must be
    called by all ranks together.
    """

    source: bool = True
    lead: bool = True
    name: str = "stage0"
    exchange: Callable[[Any], list[Any]] = only_rank


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
                    error = future.exception()
                    if error is not None and not isinstance(error, EngineError):
                        found[url] = f"{type(error).__name__}: {error}"
                    elif error is not None:
                        found[url] = str(error)
        return self._agree({**failed, **found})

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
        if failed and (require_all or len(failed) == len(self.urls)):
            reasons = "; ".join(f"{url}: {reason}" for url, reason in failed.items())
            raise WeightSyncError(f"weights of version {version!r} did not reach {len(failed)} engine(s): {reasons}")
        if self.rank.lead:
            self._log_change(version, failed)
        self._unsynced = frozenset(failed)
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
            raise EngineError("stale-weights", url, f"reports weight version {found!r} after a push of {version!r}")


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
        failed = self._on_engines(lambda url: self._groups[url].ensure_joined(), failed, self.rank.source)
        if failed:
            raise WeightSyncError("; ".join(failed.values()))

    def push(self, named_tensors: NamedTensors, version: str, *, require_all: bool = True) -> dict[str, str]:
        failed = self._on_engines(self._open, {}, self.rank.lead)
        failed = self._on_engines(lambda url: self._groups[url].ensure_joined(), failed, self.rank.source)
        error: BaseException | None = None
        try:
            failed = self._stream(named_tensors, failed)
        except Exception as raised:
            error = raised
        failed = self._agree(failed)
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

    def _stream(self, named_tensors: NamedTensors, failed: dict[str, str]) -> dict[str, str]:
        """Send this rank's tensors; returns the engines that failed by now."""
        iterator = iter(named_tensors)
        with ThreadPoolExecutor(len(self.urls), thread_name_prefix="weight-sync") as threads, drained(iterator):
            for tensors in buckets(iterator, self.settings.bucket_bytes):
                bucket = make_bucket(tensors, self._device)
                live = [url for url in self.urls if url not in failed]
                for url, future in [(url, threads.submit(self._groups[url].broadcast, bucket)) for url in live]:
                    problem = future.exception()
                    if problem is not None:
                        failed = {**failed, url: str(problem)}
        return failed

    def _open(self, url: str) -> None:
        self._call(url, "/pause_generation", {"mode": "retract"})
        try:
            self._call(url, "/begin_weight_update")
        except EngineError as error:
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
            except EngineError as error:  # it failed before, and the reason is already reported
                if error.kind == "connection":
                    return


class DiskWeightSync(WeightSync):
    """Writes a Hugging Face folder on a filesystem that trainer and engines share, and has the engines load it.

    Slower than broadcasting but without any connection to lose: an engine that restarted is simply told again. Folders
    `weights-VERSION` under `folder` appear complete (atomic rename), with config and tokenizer files from `template`
    (the checkpoint that training started from), and the last KEPT_FOLDERS stay.
    """

    def __init__(
        self,
        urls: Sequence[str],
        rank: SyncRank,
        settings: SyncSettings,
        folder: str | Path,
        template: str | Path,
    ) -> None:
        super().__init__(urls, rank, settings)
        if not (Path(template) / "config.json").is_file():
            raise FileNotFoundError(f"{template} holds no config.json: give the folder of a Hugging Face checkpoint")
        self._folder = Path(folder).resolve()
        self._template = Path(template)

    def connect(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        failed = self._on_engines(self._recover, {}, self.rank.lead)
        if failed:
            raise WeightSyncError("; ".join(failed.values()))

    def push(self, named_tensors: NamedTensors, version: str, *, require_all: bool = True) -> dict[str, str]:
        staged = self._folder / f".weights-{version}"
        final = self._folder / f"weights-{version}"
        error: BaseException | None = None
        parts: list[Part] = []
        weights = iter(named_tensors)
        self._on_lead(lambda: begin_folder(staged))  # before any source writes into it
        try:
            with drained(weights):
                parts = write_parts(weights, staged, self.rank.name, self.settings.bucket_bytes)
        except Exception as raised:
            error = raised
        everywhere = [part for own in self.rank.exchange(parts) for part in own]
        self._raise_on_errors(error)
        self._on_lead(lambda: finish_folder(staged, final, self._template, everywhere))
        failed = self._on_engines(lambda url: self._load(url, final, version), {}, self.rank.lead)
        self._on_lead(self._forget_old)
        return self._conclude(version, failed, require_all)

    def close(self) -> None:
        """Nothing is held open; the folders stay for engines that restart."""

    def _load(self, url: str, folder: Path, version: str) -> None:
        self._call(url, "/pause_generation", {"mode": "retract"})
        try:
            # Without a format SGLang takes the one it was started with: `dummy`, for engines that wait for our weights.
            body = {
                "model_path": str(folder),
                "load_format": "auto",
                "weight_version": version,
                "flush_cache": True,
            }
            self._call(url, "/update_weights_from_disk", body, timeout_s=self.settings.timeout_s)
        finally:
            self._call(url, "/continue_generation")
        self._verify(url, version)

    def _forget_old(self) -> None:
        folders = sorted(self._folder.glob("weights-*"), key=lambda folder: folder.stat().st_mtime_ns)
        for folder in folders[:-KEPT_FOLDERS]:
            shutil.rmtree(folder)


def begin_folder(staged: Path) -> None:
    """Make an empty folder `staged`."""
    shutil.rmtree(staged, ignore_errors=True)  # of a trainer that died while writing
    staged.mkdir(parents=True)


def finish_folder(staged: Path, final: Path, template: Path, parts: Sequence[Part]) -> None:
    """Make the staged parts a complete Hugging Face checkpoint and move it to `final` in one step."""
    copy_hf_files(template, staged)
    name_parts(staged, parts)
    if final.exists():
        shutil.rmtree(final)  # the same version again, after a resume
    staged.rename(final)


@contextmanager
def drained(iterator: Iterator[Any]) -> Iterator[None]:
    """Consume what is left of `iterator` when the body fails: the other ranks wait in its collectives."""
    try:
        yield
    except Exception:
        for _ in iterator:
            pass
        raise
