"""Weights into a model that is, and is not, the config's: on one rank, with parameters of Megatron's names and shapes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from megatron_sip.platform.megatron import prepare_megatron

prepare_megatron()  # before anything imports Megatron

from megatron_sip.hf import weights as hf_weights  # noqa: E402
from megatron_sip.hf.families import attention_shape, tensor_maps, tensor_shape  # noqa: E402
from megatron_sip.hf.layouts import Layout, from_shards  # noqa: E402
from megatron_sip.hf.weights import load_hf_weights, named_parameters  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    monkeypatch.setattr(hf_weights.parallel_state, "get_tensor_model_parallel_group", lambda: group)
    monkeypatch.setattr(hf_weights.parallel_state, "get_tensor_model_parallel_world_size", lambda: 1)


def policy(config: LlamaConfig, dtype: torch.dtype = torch.float32, padding: int = 5) -> torch.nn.Module:
    """A model with the parameters that Megatron's has for `config`, all of them 7."""
    model = torch.nn.Module()
    model.unpadded_vocab_size, model.share_embeddings_and_output_weights = config.vocab_size, config.tie_word_embeddings
    for entry in tensor_maps(config):
        shapes = [tuple(tensor_shape(name, config).values()) for name in entry.hf]
        rows = sum(shape[0] for shape in shapes) + padding * (entry.layout is Layout.VOCABULARY)
        place: Any = model
        *path, last = entry.megatron.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.ModuleList() if part == "layers" else torch.nn.Module())
            place = getattr(place, part)
            if isinstance(place, torch.nn.ModuleList):
                place.extend([torch.nn.Module() for _ in range(config.num_hidden_layers - len(place))])
        place.register_parameter(last, torch.nn.Parameter(torch.full((rows, *shapes[0][1:]), 7.0, dtype=dtype)))
    layers: Any = model.decoder.layers  # type: ignore[union-attr]
    for index, layer in enumerate(layers):
        layer.layer_number = index + 1
    return model


def save(folder: Path, **edits: float) -> LlamaConfig:
    """A folder of random weights; a tensor named in `edits` (dots as underscores) gets one value of that."""
    config = LlamaConfig(**SIZES)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    names = [name for entry in tensor_maps(config) for name in entry.hf]
    tensors = {name: torch.randn(*tensor_shape(name, config).values(), generator=generator) for name in names}
    for name, value in edits.items():
        [match] = [key for key in tensors if key.replace(".", "_") == name]
        tensors[match].flatten()[-1] = value
    save_file(tensors, folder / "model.safetensors")
    return config


def test_every_parameter_is_filled(tmp_path: Path) -> None:
    config = save(tmp_path)
    model = policy(config)
    load_hf_weights([model], tmp_path)
    with hf_weights.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        parameters = named_parameters([model])
        for entry in tensor_maps(config):
            shards = [parameters[entry.megatron].detach()]
            whole = from_shards(entry.layout, shards, attention_shape(config), config.vocab_size)
            assert all(torch.equal(file.get_tensor(n), t) for n, t in zip(entry.hf, whole, strict=True))
    assert not parameters["output_layer.weight"][config.vocab_size :].any()  # what Megatron pads


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 12}, r"\(vocab_size, tie_word_embeddings\) \(12, False\), the HF config \(11, False\)"),
        ({"tie_word_embeddings": True}, r"\(11, True\), the HF config \(11, False\)"),
        ({"intermediate_size": 5}, r"linear_fc1.weight is \[10, 8\] on each of 1 rank.*\[6, 8\] and \[6, 8\]"),
        ({"num_key_value_heads": 4}, r"linear_qkv.weight is \[24, 8\] .*\[8, 8\] and \[4, 8\] and \[4, 8\]"),
        ({"num_hidden_layers": 3}, r"decoder.layers.2.input_layernorm.weight has no counterpart"),
        ({"hidden_size": 12, "head_dim": 2}, r"word_embeddings.weight is \[16, 12\] .*\[11, 8\]"),
    ],
)
def test_a_model_of_other_flags_is_named_and_left_as_it_is(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    save(tmp_path)
    model = policy(LlamaConfig(**{**SIZES, **fields}))
    with pytest.raises(ValueError, match=named):
        load_hf_weights([model], tmp_path)
    assert all((parameter == 7).all() for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_a_weight_that_the_precision_has_no_room_for_is_named(tmp_path: Path, dtype: torch.dtype, fits: bool) -> None:
    config = save(tmp_path, model_layers_1_mlp_down_proj_weight=1e6)
    if fits:
        load_hf_weights([policy(config, dtype)], tmp_path)
        return
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight hold values that torch.float16 cannot"):
        load_hf_weights([policy(config, dtype)], tmp_path)
