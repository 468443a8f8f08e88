"""A Hugging Face folder as a Megatron checkpoint, and a checkpoint as such a folder, converted once and kept.

    checkpoint = converted_checkpoint(Path("Llama-3.2-1B"))      # minutes the first time, then milliseconds
    export = exported_model(Path("runs/Llama-3.2-1B"))

Many processes may ask at once: one converts, the others wait. An entry of the cache appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from megatron_sip.checkpoints.folder import TRACKER, weights_folder
from megatron_sip.child_processes import kill_with_parent
from megatron_sip.console import say
from megatron_sip.errors import UserError
from megatron_sip.files import move_into_place
from megatron_sip.hf.folder import HF_SUBFOLDER
from megatron_sip.serving.guard import own_environment

DEFAULT_CACHE = Path("~/.cache/megatron_sip/checkpoints")  # expanded where it is used: a container may have no home
EXPORTS = Path("~/.cache/megatron_sip/exports")
CACHE_VERSION = 1
KEY_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Of the files that an entry of the cache belongs to; other suffixes here would be other keys."""
LOCK_TIMEOUT_S = 4 * 3600.0
SAMPLES, SAMPLE_BYTES = 32, 1 << 16
"""Of a weight file, spread over it: a copy may keep the time stamps of other weights."""


class ConversionFailedError(UserError, ValueError):
    """The converter failed, or takes for ever."""


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` is a Hugging Face model and not a Megatron checkpoint."""
    return (folder / "config.json").is_file() and not (folder / TRACKER).is_file()


def converted_checkpoint(hf_dir: Path, cache: Path = DEFAULT_CACHE) -> Path:
    """The Megatron checkpoint of `hf_dir`, from the cache or converted now as megatron-sip-convert does.

    An entry belongs to the files as they are: their place, size, time stamp and samples of the content.

    Raises:
        ValueError: the model is not supported, a file is not whole, or config and weights do not fit together.
        ConversionFailedError: the converter failed; the message is its last.
        OSError: the folder cannot be read, or the cache not written.
    """
    entry = cache.expanduser() / f"{hf_dir.resolve().name[:60]}-{folder_key(hf_dir)}"
    if not _complete(entry):
        _check(hf_dir)
        _convert_once(hf_dir, entry, "hf-to-megatron")
    return entry


@dataclass(frozen=True, slots=True)
class Export:
    """A checkpoint of step `step` (or "release") as the HF folder `folder`. key: tells its weights from all others."""

    folder: Path
    step: str
    key: str


def exported_model(checkpoint: Path, cache: Path = EXPORTS) -> Export:
    """The HF folder of the latest checkpoint in `checkpoint`, from the cache or exported now; whoever asks shares it.

    An entry belongs to the checkpoint's files as they are: a run that was trained anew in its folder has another one.

    Raises:
        ConversionFailedError: the converter failed, or the run saved another step meanwhile.
        OSError: the folder cannot be read, or the cache not written.
    """
    step, key = (checkpoint / TRACKER).read_text().strip(), checkpoint_key(checkpoint)
    entry = cache.expanduser() / f"{checkpoint.resolve().name[:40]}-{step}-{key}"
    if not _is_whole_model(entry):
        shutil.rmtree(entry, ignore_errors=True)
        _convert_once(checkpoint, entry, "megatron-to-hf")
        if checkpoint_key(checkpoint) != key:
            shutil.rmtree(entry, ignore_errors=True)  # nobody knows of which step it is
            raise ConversionFailedError(
                f"{checkpoint}: its run saved another step meanwhile: give the command again when it has ended"
            )
    return Export(entry, step, key)


def _is_whole_model(folder: Path) -> bool:
    try:
        _check(folder)
    except (OSError, ValueError):
        return False
    return True


def _convert_once(source: Path, entry: Path, direction: str) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = entry.with_name(entry.name + ".lock")
    try:
        with filelock.FileLock(lock, timeout=LOCK_TIMEOUT_S):
            if not _complete(entry):
                say(f"converting {source} into {entry}")
                _fill(entry, source, direction)
    except filelock.Timeout:
        raise ConversionFailedError(
            f"{source}: another process has been converting it for {LOCK_TIMEOUT_S:.0f} s (lock {lock}): wait for it, or end it"
        ) from None


def _check(hf_dir: Path) -> None:
    """What the converter would refuse after its start, at once."""
    from megatron_sip.hf.files import checked_tensors, read_hf_config  # imports torch and transformers

    checked_tensors(hf_dir, read_hf_config(hf_dir))


def folder_key(hf_dir: Path) -> str:
    """What tells the folder's present state from others, as a checkpoint of this machine."""
    from megatron_sip.platform.megatron import machine_arguments  # imports torch, with CUDA Megatron

    # Transformer Engine's layers keep more in a checkpoint than those that a machine without it has.
    return _key([str(hf_dir.resolve()), machine_arguments(), *_files(hf_dir, KEY_SUFFIXES)])


def weights_key(hf_dir: Path) -> str:
    """What tells the model in an HF folder, as its files are now, from others."""
    return _key(_files(hf_dir, KEY_SUFFIXES))


def checkpoint_key(checkpoint: Path) -> str:
    """The same of the latest checkpoint in a folder of Megatron's: its step, its files, and the config beside them."""
    step, files = (checkpoint / TRACKER).read_text().strip(), _files(weights_folder(checkpoint))
    return _key([step, *files, *_files(checkpoint / HF_SUBFOLDER, KEY_SUFFIXES)])


def _key(identity: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *identity]).encode()).hexdigest()[:20]


def _files(folder: Path, suffixes: Sequence[str] | None = None) -> list[list[object]]:
    """Name, place, size, time stamp and samples of each file; without suffixes of all but checksums, which come later."""
    found: list[list[object]] = []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        wanted = file.suffix in suffixes if suffixes else not file.match("checksums_*") and ".partial" not in file.name
        if wanted and file.is_file():
            stat = file.stat()
            samples = _samples(file, stat.st_size)
            found.append([file.name, str(file.resolve()), stat.st_size, stat.st_mtime_ns, samples])
    return found


def _samples(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for index in range(SAMPLES):
            opened.seek(index * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _complete(entry: Path) -> bool:
    """Whether it holds what a converter writes last."""
    return (entry / TRACKER).is_file() or (entry / "config.json").is_file()


def _fill(entry: Path, source: Path, direction: str) -> None:
    own = f".{entry.name}-{socket.gethostname()}-"
    for stale in entry.parent.glob(f"{own}*"):  # of a process of this machine that was killed: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=own, dir=entry.parent, ignore_cleanup_errors=True) as work:
        staged = Path(work) / "converted"
        _convert(source, staged, direction)
        # Where locks do not reach across nodes, another one may have finished first: its entry is equal, ours goes.
        with suppress(OSError):
            move_into_place(staged, entry)
        if not _complete(entry):
            shutil.rmtree(entry, ignore_errors=True)  # a damaged entry, e.g. emptied by hand
            move_into_place(staged, entry)


def _convert(source: Path, target: Path, direction: str) -> None:
    """In a process of its own: Megatron has one state per process, and this one's is the caller's."""
    command = [sys.executable, "-m", "megatron_sip.hf.convert", direction, "--load", str(source)]
    done = subprocess.run(
        [*command, "--save", str(target)],
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        preexec_fn=kill_with_parent,
    )
    from_converter = _own_lines(done.stdout.splitlines())
    if done.returncode:
        # Then the converter's last line is a note, not the reason.
        crashed = done.returncode < 0 or "Traceback (most recent call last)" in done.stdout
        told = from_converter and not crashed
        raise ConversionFailedError(from_converter[-1] if told else f"the converter failed:\n{done.stdout[-3000:]}")
    for line in from_converter[:-1]:  # the last one names the folder that is moved now
        say(line)


def _own_lines(lines: Sequence[str]) -> list[str]:
    from megatron_sip.hf.convert import PREFIX

    return [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
