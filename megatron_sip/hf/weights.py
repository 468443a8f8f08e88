"""Weights between Hugging Face safetensors and a (TP, PP sharded) Megatron model, through the tables of `families`.

    load_hf_weights(model, hf_dir)                                 # every rank reads its own part of the files
    for name, tensor in export_hf_weights(model, hf_config): ...   # every rank iterates; the owner gets the tensor

Both keep the parameters' precision and hold one parameter at a time beside the model. `export_hf_weights` serves the
checkpoint converter and the weight sync of every training step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

from megatron_sip.hf.families import (
    EMBEDDING,
    OUTPUT,
    TRANSFORMER_ENGINE_NAMES,
    TensorMap,
    attention_shape,
    tensor_maps,
    tensor_shape,
)
from megatron_sip.hf.files import checked_tensors, read_hf_config
from megatron_sip.hf.layouts import Layout, from_shards, is_shard_of, to_shard


def named_parameters(model_chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by their name in the tables: global layer numbers, unfused norm names, no wrappers."""
    return {
        _table_name(name, chunk): parameter
        for chunk in _unwrapped(model_chunks)
        for name, parameter in chunk.named_parameters()
    }


def _unwrapped(model_chunks: Sequence[torch.nn.Module]) -> Iterator[Any]:
    for wrapped in model_chunks:
        chunk: Any = wrapped
        while not hasattr(chunk, "decoder"):
            chunk = chunk.module
        yield chunk


def export_hf_weights(
    model_chunks: Sequence[torch.nn.Module], hf_config: Any, *, every_replica: bool = False
) -> Iterator[tuple[str, Tensor | None]]:
    """The model's HF tensors, whole and unpadded, in the order of the forward pass.

    Collective: the call over all tensor and pipeline parallel ranks, the iterator over the tensor-parallel ranks of a stage,
    each of which must iterate to the end; so stages may take turns. Each rank sees every name. The tensor comes on the
    source rank: tensor-parallel rank 0 of data-parallel rank 0, or with `every_replica` of each, of the stage that owns it;
    others get None. A tensor is a contiguous copy or a view of the parameter: use it before the next optimizer step.

    Raises:
        ValueError: the model's parameters are not those of the config's architecture.
    """
    _check_vocabulary(model_chunks, hf_config)
    parameters = named_parameters(model_chunks)
    exports = every_replica or parallel_state.get_data_parallel_rank() == 0
    return _exported(parameters, _owning_stages(parameters, hf_config), hf_config, exports)


def _exported(
    parameters: Mapping[str, torch.nn.Parameter], owners: Mapping[str, int], hf_config: Any, exports: bool
) -> Iterator[tuple[str, Tensor | None]]:
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for entry in tensor_maps(hf_config):
        tensors: Sequence[Tensor | None] = [None] * len(entry.hf)
        if owners[entry.megatron] == stage and exports:
            shards = _gather_shards(entry, parameters[entry.megatron].detach())
            if shards is not None:
                tensors = from_shards(entry.layout, shards, attention_shape(hf_config), hf_config.vocab_size)
        yield from zip(entry.hf, tensors, strict=True)


@torch.no_grad()
def load_hf_weights(model_chunks: Sequence[torch.nn.Module], hf_dir: Path | str) -> None:
    """Fill this rank's parameters from the safetensors files of an HF checkpoint folder.

    No communication. With an optimizer that is already built, call its `reload_model_params()` afterwards.

    Raises:
        FileNotFoundError: the folder has no safetensors, or not all.
        ValueError: files, config and model do not fit together (`checked_tensors`), or a value is not finite in the
            model's precision (named).
    """
    hf_dir = Path(hf_dir)
    hf_config = read_hf_config(hf_dir)
    stored = checked_tensors(hf_dir, hf_config)
    by_name = {entry.megatron: entry for entry in _with_tied_output(tensor_maps(hf_config))}
    _check_vocabulary(model_chunks, hf_config)
    parameters = named_parameters(model_chunks)
    _check_model({name: tuple(parameter.shape) for name, parameter in parameters.items()}, hf_config)
    rank = parallel_state.get_tensor_model_parallel_group().rank()
    with ExitStack() as stack:
        files = {tensor.file for tensor in stored.values()}
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        for name, parameter in parameters.items():
            entry = by_name[name]
            slices = [opened[stored[hf_name].file].get_slice(hf_name) for hf_name in entry.hf]
            shape = attention_shape(hf_config)
            parameter.copy_(to_shard(entry.layout, slices, parameter.shape, shape, hf_config.vocab_size, rank))
            if not parameter.isfinite().all():
                raise ValueError(f"{hf_dir}: {', '.join(entry.hf)} hold values that {parameter.dtype} cannot")


def _with_tied_output(maps: Sequence[TensorMap]) -> list[TensorMap]:
    """The entries of a model's parameters: a tied model's last stage holds a copy of the embedding as its output layer."""
    untied = any(entry.megatron == OUTPUT.megatron for entry in maps)
    return [*maps] if untied else [*maps, TensorMap(OUTPUT.megatron, EMBEDDING.hf, Layout.VOCABULARY)]


def _check_vocabulary(model_chunks: Sequence[torch.nn.Module], hf_config: Any) -> None:
    """Raise ValueError, on all ranks alike, for what the shapes of padded and shared tables do not show."""
    for chunk in _unwrapped(model_chunks):
        found = (chunk.unpadded_vocab_size, chunk.share_embeddings_and_output_weights)
        expected = (hf_config.vocab_size, hf_config.tie_word_embeddings)
        if found != expected:
            raise ValueError(
                f"the model has (vocab_size, tie_word_embeddings) {found}, the HF config {expected}: wrong model flags?"
            )


def _check_model(shapes: Mapping[str, tuple[int, ...]], hf_config: Any) -> None:
    """Raise ValueError when a parameter (its shape on a rank) is not the config's: Megatron would cut or pad it."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    by_name = {entry.megatron: entry for entry in _with_tied_output(tensor_maps(hf_config))}
    for name, shape in shapes.items():
        entry = by_name.get(name)
        if entry is None:
            raise ValueError(f"the model's parameter {name} has no counterpart in the HF config: wrong model flags?")
        whole = [tuple(tensor_shape(hf_name, hf_config).values()) for hf_name in entry.hf]
        if not is_shard_of(entry.layout, shape, whole, tp_size):
            raise ValueError(
                f"the model's {name} is {list(shape)} on each of {tp_size} rank(s), {' and '.join(entry.hf)} of the HF "
                f"config are {' and '.join(str(list(size)) for size in whole)}: wrong model flags?"
            )


def _table_name(name: str, chunk: Any) -> str:
    """A parameter's name in the tables, from its name inside a pipeline stage."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    local_index, rest = name.removeprefix(prefix).split(".", 1)
    number = chunk.decoder.layers[int(local_index)].layer_number - 1
    return f"{prefix}{number}.{TRANSFORMER_ENGINE_NAMES.get(rest, rest)}"


def _owning_stages(parameters: Mapping[str, Tensor], hf_config: Any) -> dict[str, int]:
    """Pipeline rank of each Megatron parameter in the tables; ValueError, on all ranks, if the model has others."""
    group = parallel_state.get_pipeline_model_parallel_group()
    shapes_by_stage: list[Any] = [None] * dist.get_world_size(group)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    dist.all_gather_object(shapes_by_stage, shapes, group=group)
    owners: dict[str, int] = {}
    for stage, found in enumerate(shapes_by_stage):
        _check_model(found, hf_config)
        for name in found:
            owners.setdefault(name, stage)
    missing = {entry.megatron for entry in tensor_maps(hf_config)} - set(owners)
    if missing:
        raise ValueError(f"the model's parameters are not those of the HF config: missing {sorted(missing)[:5]}")
    return owners


def _gather_shards(entry: TensorMap, parameter: Tensor) -> list[Tensor] | None:
    """The parameter's shards in rank order on tensor-parallel rank 0, None on the others."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or entry.layout is Layout.REPLICATED:
        return [parameter] if group.rank() == 0 else None
    shards = [torch.empty_like(parameter) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(parameter.contiguous(), shards, group=group, group_dst=0)
    return shards
