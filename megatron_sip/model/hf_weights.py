"""Weights between Hugging Face safetensors and a (TP, PP sharded) Megatron model, through the tables of `hf_families`.

    load_hf_weights(model, hf_dir)                                 # every rank reads its own part of the files
    for name, tensor in export_hf_weights(model, hf_config): ...   # every rank iterates; the owner gets the tensor

Both keep the parameters' precision and hold one parameter at a time beside the model. `export_hf_weights` serves the
checkpoint converter and the weight sync of every training step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from megatron_sip.model.hf_families import (
    EMBEDDING,
    OUTPUT,
    TRANSFORMER_ENGINE_NAMES,
    TensorMap,
    attention_shape,
    megatron_arguments_from_hf,
    tensor_maps,
)
from megatron_sip.model.hf_layouts import Layout, from_shards, to_shard

__all__ = ["export_hf_weights", "load_hf_weights", "megatron_arguments_from_hf", "named_parameters"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def named_parameters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their name in the tables: global layer numbers, unfused norm names, no wrappers."""
    parameters = {}
    for wrapped in model_chunks:
        chunk: Any = wrapped
        while not hasattr(chunk, "decoder"):
            chunk = chunk.module
        for name, parameter in chunk.named_parameters():
            parameters[_table_name(name, chunk)] = parameter
    return parameters


def export_hf_weights(model_chunks: Sequence[torch.nn.Module], hf_config: Any) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the model's HF tensors, whole and unpadded, in the order of the forward pass.

    Collective over all tensor and pipeline parallel ranks: each must iterate to the end, and each sees every name. The
    tensor comes on the source rank: tensor-parallel rank 0 of data-parallel rank 0 of the stage that owns it; others
    get None. Stages take turns: one starts when the ranks of the one before have consumed their last tensor. A tensor
    is a contiguous copy or a view of the parameter: use it before the next optimizer step.

    Raises:
        ValueError: the model's parameters are not those of the config's architecture.
    """
    parameters = named_parameters(model_chunks)
    maps = tensor_maps(hf_config)
    owners = _owning_stages(set(parameters), maps)
    stages = parallel_state.get_pipeline_model_parallel_group()
    is_source = parallel_state.get_data_parallel_rank() == 0
    previous = owners[maps[0].megatron]
    for entry in maps:
        owner = owners[entry.megatron]
        if owner != previous:
            dist.barrier(group=stages)
        previous = owner
        tensors: Sequence[Tensor | None] = [None] * len(entry.hf)
        if owner == stages.rank() and is_source:
            shards = _gather_shards(entry, parameters[entry.megatron].detach())
            if shards is not None:
                tensors = from_shards(entry.layout, shards, attention_shape(hf_config), hf_config.vocab_size)
        yield from zip(entry.hf, tensors, strict=True)


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[torch.nn.Module], hf_dir: Path | str) -> None:
    """Fill this rank's parameters from the safetensors files of an HF checkpoint folder.

    No communication. With an optimizer that is already built, call its `reload_model_params()` afterwards.

    Raises:
        FileNotFoundError: the folder has no safetensors.
        ValueError: tensors of the file and of the architecture differ (named), or a shape does not fit.
    """
    hf_dir = Path(hf_dir)
    hf_config = AutoConfig.from_pretrained(hf_dir)
    files = _tensor_files(hf_dir)
    maps = tensor_maps(hf_config)
    _check_names(files, maps, hf_dir)
    by_name = {entry.megatron: entry for entry in maps}
    if hf_config.tie_word_embeddings:  # the last stage holds a copy of the embedding as its output layer
        by_name[OUTPUT.megatron] = TensorMap(OUTPUT.megatron, EMBEDDING.hf, Layout.VOCABULARY)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(files.values())}
        for name, parameter in named_parameters(model_chunks).items():
            entry = by_name.get(name)
            if entry is None:
                raise ValueError(f"the model's parameter {name} has no counterpart in {hf_dir}: wrong model flags?")
            shard = to_shard(
                entry.layout,
                [opened[files[hf_name]].get_slice(hf_name) for hf_name in entry.hf],
                parameter.shape,
                attention_shape(hf_config),
                hf_config.vocab_size,
                tp_group.rank(),
            )
            if shard.shape != parameter.shape:
                raise ValueError(
                    f"{', '.join(entry.hf)} give {list(shard.shape)}, the model's {name} is {list(parameter.shape)}"
                )
            parameter.copy_(shard)


def _table_name(name: str, chunk: Any) -> str:
    """A parameter's name in the tables, from its name inside a pipeline stage."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    local_index, rest = name.removeprefix(prefix).split(".", 1)
    number = chunk.decoder.layers[int(local_index)].layer_number - 1
    return f"{prefix}{number}.{TRANSFORMER_ENGINE_NAMES.get(rest, rest)}"


def _owning_stages(local_names: set[str], maps: Sequence[TensorMap]) -> dict[str, int]:
    """Pipeline rank of each Megatron parameter in the tables; ValueError if the model has others or lacks one."""
    group = parallel_state.get_pipeline_model_parallel_group()
    names_by_stage: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names_by_stage, sorted(local_names), group=group)
    owners: dict[str, int] = {}
    for stage, names in enumerate(names_by_stage):
        for name in names:
            owners.setdefault(name, stage)
    expected = {entry.megatron for entry in maps}
    unexpected = set(owners) - expected - {OUTPUT.megatron}  # a tied model's last stage holds a copy of the embedding
    missing = expected - set(owners)
    if missing or unexpected:
        raise ValueError(
            "the model's parameters are not those of the HF config: "
            f"missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}"
        )
    return owners


def _gather_shards(entry: TensorMap, parameter: Tensor) -> list[Tensor] | None:
    """The parameter's shards in rank order on tensor-parallel rank 0, None on the others."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or entry.layout is Layout.REPLICATED:
        return [parameter] if group.rank() == 0 else None
    shards = [torch.empty_like(parameter) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(parameter.contiguous(), shards, group=group, group_dst=0)
    return shards


def _tensor_files(hf_dir: Path) -> dict[str, Path]:
    """The safetensors file of each tensor name."""
    index = hf_dir / INDEX_FILE
    if index.exists():
        return {name: hf_dir / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = hf_dir / WEIGHTS_FILE
    if not single.exists():
        raise FileNotFoundError(
            f"{hf_dir} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; save the model as safetensors"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _check_names(files: Mapping[str, Path], maps: Sequence[TensorMap], hf_dir: Path) -> None:
    expected = {name for entry in maps for name in entry.hf}
    tied = not any(entry.megatron == OUTPUT.megatron for entry in maps)
    ignorable = {name for name in files if name.endswith("rotary_emb.inv_freq")} | (set(OUTPUT.hf) if tied else set())
    missing, unexpected = expected - set(files), set(files) - expected - ignorable
    if missing or unexpected:
        raise ValueError(
            f"{hf_dir}: the tensors are not those of its config: "
            f"missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}"
        )
