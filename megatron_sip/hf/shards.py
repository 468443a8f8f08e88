"""The one writer of a model as a Hugging Face folder, from ranks that each have some of the tensors.

Each writes its tensors as parts; then one of them, told of all parts, completes the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_sip.files import write_atomically
from megatron_sip.hf.folder import write_model_files

NamedTensors = Iterable[tuple[str, Tensor | None]]
"""None: another rank has the tensor."""
Tensors = list[tuple[str, Tensor]]
Part = tuple[str, list[str], int]
"""File, the names of its tensors, their bytes."""


def buckets(named_tensors: NamedTensors, bucket_bytes: int) -> Iterator[Tensors]:
    """Group the tensors that are not None, in order, into lists of at most `bucket_bytes` (a larger one goes alone)."""
    pending: Tensors = []
    size = 0
    for name, tensor in named_tensors:
        if tensor is None:
            continue
        if pending and size + tensor.nbytes > bucket_bytes:
            yield pending
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
    if pending:
        yield pending


def write_parts(named_tensors: NamedTensors, folder: Path, owner: str, part_bytes: int) -> list[Part]:
    """Write the tensors that this rank has, one part at a time in memory; `owner` is its name among the writers."""
    parts: list[Part] = []
    for tensors in buckets(named_tensors, part_bytes):
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        file = f"part-{owner}-{len(parts)}.tmp"
        save_file(held, folder / file, metadata={"format": "pt"})
        parts.append((file, list(held), sum(tensor.nbytes for tensor in held.values())))
    return parts


def name_parts(folder: Path, parts: Sequence[Part]) -> None:
    """Make the parts of all ranks model.safetensors, or if there are several numbered files with an index."""
    weight_map: dict[str, str] = {}
    for number, (temporary, names, _) in enumerate(parts, start=1):
        final = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (folder / temporary).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(size for _, _, size in parts)}, "weight_map": weight_map}
        write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def complete_model(folder: Path, parts: Sequence[Part], template: Path) -> None:
    """Make `folder`, in which the parts of all ranks lie, a model with the config and tokenizer of the one in `template`."""
    name_parts(folder, parts)
    write_model_files(template, folder)
