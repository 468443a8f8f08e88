"""A trainer's side of weight pushes without a trainer: connects, pushes one folder's weights, may be killed at any moment."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from safetensors.torch import load_file

from megatron_sip.rollout.sync_disk import DiskWeightSync
from megatron_sip.rollout.sync_distributed import DistributedWeightSync
from megatron_sip.rollout.weight_group import SyncSettings
from megatron_sip.rollout.weight_sync import SyncRank, WeightSync

SETTINGS = SyncSettings(timeout_s=15.0, bucket_bytes=1 << 20)  # an undisturbed push takes a second


def open_sync(kind: str, url: str, model: Path, folder: Path) -> WeightSync:
    """A client of `kind` (distributed or disk) that is the only rank of its trainer."""
    if kind == "disk":
        return DiskWeightSync([url], SyncRank(), SETTINGS, folder=folder, template=model)
    return DistributedWeightSync([url], SyncRank(), SETTINGS)


def push_forever(kind: str, url: str, model: Path, folder: Path, began: Connection) -> None:
    """Says on `began` when a connection begins, has joined, and when one push has ended; pushes on until it is killed."""
    tensors = load_file(model / "model.safetensors")
    began.send("begins")
    sync = open_sync(kind, url, model, folder)
    sync.connect()
    began.send("joined")
    sync.push(tensors.items(), version="first")
    began.send("ended")
    while True:
        sync.push(tensors.items(), version="later")
