"""Weights through a file system that trainer and engines share: a Hugging Face folder a version, which the engines load.

Slower than broadcasting, but written once for all engines, and without any connection to lose: an engine that restarted is
simply told again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_sip.console import say
from megatron_sip.hf.shards import NamedTensors, Part, complete_model, write_parts
from megatron_sip.rollout.handshake import WeightSyncError
from megatron_sip.rollout.weight_group import SyncSettings
from megatron_sip.rollout.weight_sync import SyncRank, WeightSync, drained

KEPT_FOLDERS = 2
"""Engines may still read the newest."""


class DiskWeightSync(WeightSync):
    """Writes `weights-VERSION` under `folder`, there as a whole or not at all, and has the engines load it.

    Config and tokenizer are those of `template`, the checkpoint that training started from; the last KEPT_FOLDERS stay.
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
            try:
                shutil.rmtree(folder)
            except OSError as error:  # on NFS what an engine still has open stays; the next push tries again
                say(f"weights: an old folder stays for now: {error}")


def begin_folder(staged: Path) -> None:
    """Make an empty folder `staged`."""
    shutil.rmtree(staged, ignore_errors=True)  # of a trainer that died while writing
    staged.mkdir(parents=True)


def finish_folder(staged: Path, final: Path, template: Path, parts: Sequence[Part]) -> None:
    """Make the staged parts a complete Hugging Face checkpoint and move it to `final` in one step."""
    complete_model(staged, parts, template)
    if final.exists():
        shutil.rmtree(final)  # the same version again, after a resume
    staged.rename(final)
