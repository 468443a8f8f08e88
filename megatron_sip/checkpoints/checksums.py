"""Checksums beside a checkpoint's shards: what the disk gives back is what was saved, or the damaged file is named.

Each rank sums up the files that it wrote, once the checkpoint is committed and while training goes on; before a checkpoint
is loaded the ranks divide its files among them. A checkpoint without checksums (of an earlier version, or of a run that was
killed in between) still loads: of its shards only the lengths are known, from Megatron's metadata.
"""

from __future__ import annotations

import json
import logging
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from megatron_sip.files import write_atomically

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 24
Sums = dict[str, tuple[int, int]]
"""File name -> (bytes, CRC-32): 2 GB/s on one core, and misses one damage in four thousand million."""


def write_checksums(folder: Path, rank: int) -> None:
    """Write the checksums of the files in checkpoint `folder` that `rank` wrote to a file of their own. Raises OSError."""
    sums = {path.name: checksum(path) for path in files_of_rank(folder, rank)}
    write_atomically(folder / f"checksums_{rank:05d}.json", json.dumps(sums, indent=1) + "\n")


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """The shards of `rank`, by Megatron's names; rank 0 also has whatever is no shard."""
    shards = sorted(folder.glob(f"__{rank}_*"))
    if rank:
        return shards
    others = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("__"))
    return [
        *shards,
        *sorted(path for path in others if not path.match("checksums_*.json") and ".partial" not in path.name),
    ]


def checksum(path: Path) -> tuple[int, int]:
    """Length in bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def damages(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, a line each that names the file; of every `parts`-th of them, from `part`."""
    sums: Sums = {}
    found = []
    for path in sorted(folder.glob("checksums_*.json")):
        try:
            sums |= {name: (int(size), int(crc)) for name, (size, crc) in json.loads(path.read_bytes()).items()}
        except (ValueError, TypeError, AttributeError):
            found += [f"{path} cannot be read"] if part == 0 else []
    for name in sorted(sums)[part::parts]:
        size, crc = sums[name]
        found += _damage(folder / name, size, crc)
    if part == 0:
        try:
            lengths = shard_lengths(folder)
        except Exception as error:  # unpickling raises whatever the bytes say
            found.append(f"{folder / '.metadata'} cannot be read ({type(error).__name__})")
        else:
            found += [line for name in sorted(lengths.keys() - sums) for line in _damage(folder / name, lengths[name])]
    return found


def _damage(path: Path, size: int, crc: int | None = None) -> list[str]:
    """A line if the file does not have `size` bytes (without a `crc`: at least) or another checksum."""
    if not path.is_file():
        return [f"{path} is missing"]
    present = path.stat().st_size
    if present < size or (present > size and crc is not None):
        return [f"{path} has {present:,} bytes instead of {size:,}"]
    if crc is not None and checksum(path)[1] != crc:
        return [f"{path} has another checksum than when it was saved"]
    return []


def shard_lengths(folder: Path) -> dict[str, int]:
    """File name -> the bytes that a shard must at least have."""
    if not (folder / ".metadata").exists():
        return {}
    lengths: dict[str, int] = {}
    for entry in (FileSystemReader(folder).read_metadata().storage_data or {}).values():
        lengths[entry.relative_path] = max(lengths.get(entry.relative_path, 0), entry.offset + entry.length)
    return lengths


class ChecksumWriter:
    """Writes this rank's checksums of committed checkpoints in the background. Never raises: a checkpoint does without."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._under_way: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checksums")

    def begin(self, folder: Path) -> None:
        """Start on a checkpoint that has been saved to `folder`."""
        self._under_way = [each for each in self._under_way if not each.done()]
        self._under_way.append(self._thread.submit(self._write, folder))

    def finish(self) -> None:
        """Wait for those that are under way."""
        wait(self._under_way)

    def _write(self, folder: Path) -> None:
        try:
            write_checksums(folder, self._rank)
        except Exception as error:
            if folder.exists():
                log.warning("no checksums of %s, it loads unverified: %s", folder, error)
