"""The folder hf/ that lies beside Megatron checkpoints: the model's Hugging Face files without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

HF_SUBFOLDER = "hf"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5"),
    *(".msgpack", ".onnx", ".ot"),
)

POINTER_START = b"version https://git-lfs.github.com/spec/"
READ_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Of the files of a folder that config and tokenizer are read from."""


def refuse_pointer(file: Path) -> None:
    """Raise ValueError when `file` is what git leaves of a large file that was not fetched."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER_START)) == POINTER_START:
            raise ValueError(
                f"{file} is a git-LFS pointer, not the file itself: run `git lfs pull` in {file.parent}, or download it"
            )


def refuse_pointers(folder: Path) -> None:
    """`refuse_pointer` for what config and tokenizer are read from; weights are looked at when they are read."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in READ_SUFFIXES:
            refuse_pointer(file)


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy everything of an HF folder but weights and what `target` has: config, generation config, tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES) and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)


def renew_hf_files(source: Path, target: Path) -> None:
    """`copy_hf_files` into a folder that another model's may be in: of a run that ended before its first checkpoint.

    A folder with weights is somebody's model: what it has stays.
    """
    if target.is_dir() and not target.samefile(source):
        files = [file for file in target.iterdir() if file.is_file()]
        if not any(file.name.endswith(WEIGHT_SUFFIXES) for file in files):
            for file in files:
                file.unlink()
    copy_hf_files(source, target)
