"""Hugging Face folders that are not whole, or not of one model: each is named before a weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_sip.hf.families import tensor_maps, tensor_shape
from megatron_sip.hf.files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    checked_tensors,
    read_hf_config,
    rounding,
    stored_tensors,
)
from megatron_sip.hf.folder import refuse_pointers, write_model_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 268090\n"
SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=False),
}


def shapes_of(config: Any) -> dict[str, dict[str, int]]:
    return {name: tensor_shape(name, config) for entry in tensor_maps(config) for name in entry.hf}


def tensors_of(config: Any) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(*shape.values()) for name, shape in shapes_of(config).items()}


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    """Two or more files and an index that says what each holds."""
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tensor_of_another_size_is_named_with_the_config_s_field(tmp_path: Path, data: st.DataObject) -> None:
    """Vocabulary, heads, head size, MLP: none is cut, none is filled with zeros."""
    config = data.draw(st.sampled_from(list(CONFIGS.values())))
    tensors = tensors_of(config)
    name = data.draw(st.sampled_from(sorted(tensors)))
    dimension = data.draw(st.integers(0, tensors[name].dim() - 1))
    shape = list(tensors[name].shape)
    right = list(shape)
    shape[dimension] = data.draw(st.integers(1, 30).filter(lambda size: size != right[dimension]))
    save_file(tensors | {name: torch.zeros(shape)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=name) as caught:
        checked_tensors(tmp_path, config)
    field, size = list(tensor_shape(name, config).items())[dimension]
    for part in (f"{tmp_path / WEIGHTS_FILE}: ", f"is {shape}", f"makes it {right}", f"({field} = {size})"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_fits_is_accepted(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    save_file(tensors_of(config), tmp_path / WEIGHTS_FILE)
    stored = checked_tensors(tmp_path, config)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(shape.values()) for name, shape in shapes_of(config).items()
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MistralConfig(architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
        (LlamaConfig(mlp_bias=True), "mlp_bias"),
    ],
)
def test_a_model_that_is_not_supported_is_named_before_its_weights_are(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}.* supported"):
        checked_tensors(tmp_path, config)


def test_how_many_tensors_do_not_fit_is_said(tmp_path: Path) -> None:
    save_file(tensors_of(CONFIGS["llama"]), tmp_path / WEIGHTS_FILE)
    other = LlamaConfig(**{**SIZES, "intermediate_size": 7}, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"gate_proj.*intermediate_size = 7.*\(2 more tensors do not fit\)"):
        checked_tensors(tmp_path, other)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model_type": "lla', "not a valid JSON file"),
        ('{"model_type": "llama", "hidden_size": 6, "num_attention_heads": 4}', r"hidden size \(6\) is not a multiple"),
        ('{"model_type": "llama", "hidden_size": "many"}', "hidden_size"),
        (POINTER, "git-LFS pointer"),
        (None, "does not exist"),
    ],
)
def test_a_config_that_is_not_sound_is_named_in_a_line(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_hf_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_anywhere_is_named(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / WEIGHTS_FILE
    save_file(tensors_of(CONFIGS["llama"]), file)
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=f"{file} .*bytes.* no whole safetensors file .*download it again"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("file", [WEIGHTS_FILE, INDEX_FILE])
def test_a_git_lfs_pointer_is_told_from_weights(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(POINTER)
    with pytest.raises(ValueError, match=f"{file} is a git-LFS pointer.*git lfs pull"):
        stored_tensors(tmp_path)


def test_a_git_lfs_pointer_is_told_from_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "logo.png").write_text(POINTER)  # nobody reads it
    (tmp_path / "q4.gguf").write_text(POINTER)
    (tmp_path / "config.json").write_text("{}")
    refuse_pointers(tmp_path)
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer.json is a git-LFS pointer"):
        refuse_pointers(tmp_path)


TENSORS = tensors_of(CONFIGS["llama"])
NAMES = sorted(TENSORS)
SHARDS = {
    "a.safetensors": {name: TENSORS[name] for name in NAMES[:5]},
    "b.safetensors": {name: TENSORS[name] for name in NAMES[5:]},
}


def test_shards_together_they_are_the_model(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS)
    stored = checked_tensors(tmp_path, CONFIGS["llama"])
    assert {name: tensor.file.name for name, tensor in stored.items()} == {
        name: file for file, tensors in SHARDS.items() for name in tensors
    }


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.safetensors, which .*index.json names, does not exist"):
        stored_tensors(tmp_path)


def test_a_shard_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS)
    save_file({name: TENSORS[name] for name in NAMES[6:]}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=rf"b.safetensors lacks {NAMES[5]}, which .*index.json says it holds"):
        stored_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {**SHARDS, "c.safetensors": {NAMES[0]: TENSORS[NAMES[0]]}})
    with pytest.raises(ValueError, match=rf"{NAMES[0]} lies in two files, .*a.safetensors and .*c.safetensors"):
        stored_tensors(tmp_path)


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    """Which of them transformers, the engines and we read would be anyone's guess."""
    write_shards(tmp_path, SHARDS)
    save_file(TENSORS, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="two sets of weights"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"index.json is no index of safetensors"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("difference", [0.0, 1.0])
def test_two_different_tables_of_a_tied_model_are_refused(tmp_path: Path, difference: float) -> None:
    """One would have been lost without a word."""
    tensors = tensors_of(CONFIGS["qwen2"])
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] = difference
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS_FILE)
    if not difference:
        checked_tensors(tmp_path, CONFIGS["qwen2"])
        return
    with pytest.raises(ValueError, match=r"tie_word_embeddings.*lm_head.weight and model.embed_tokens.weight differ"):
        checked_tensors(tmp_path, CONFIGS["qwen2"])


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIGS["llama"])
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"{name} is F8_E4M3"):
        checked_tensors(tmp_path, CONFIGS["llama"])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_told_exactly_where_a_value_can_change(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    save_file({"a": torch.zeros(1, dtype=stored), "b": torch.zeros(1, dtype=wanted)}, tmp_path / WEIGHTS_FILE)
    note = rounding(stored_tensors(tmp_path), wanted)
    finest = torch.tensor(
        [1 + torch.finfo(stored).eps, torch.finfo(stored).tiny, torch.finfo(stored).max], dtype=stored
    )
    if torch.equal(finest.to(wanted).to(stored), finest):
        assert note is None
    else:
        assert note is not None
        assert f"1 tensors from {stored} to {wanted}" in note


def test_rounding_counts_only_what_is_read(tmp_path: Path) -> None:
    """Old files hold rotary frequencies in float32, and a tied model's may repeat the embedding."""
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(CONFIGS["qwen2"]).items()}
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "lm_head.weight": torch.zeros(11, 8)}
    save_file(tensors | extra, tmp_path / WEIGHTS_FILE)
    checked = checked_tensors(tmp_path, CONFIGS["qwen2"])
    assert set(checked) == set(tensors)
    assert rounding(checked, torch.bfloat16) is None


def test_an_index_of_other_weights_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (tmp_path / "model" / name).write_text("{}")
    write_model_files(tmp_path / "model", tmp_path / "copy")
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["config.json"]
