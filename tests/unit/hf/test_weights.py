"""The HF tables and layouts: splitting for any TP size and putting together again gives every bit back."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from workers import LLAMA3_ROPE

from megatron_sip.hf.families import (
    FAMILIES,
    attention_shape,
    megatron_arguments_from_hf,
    tensor_maps,
)
from megatron_sip.hf.layouts import Layout, from_shards, to_shard
from megatron_sip.hf.weights import load_hf_weights
from megatron_sip.model.tensor_parallel import AttentionShape, tensor_parallel_faults

ANY_ATTENTION = AttentionShape(heads=4, groups=2, head_dim=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """HF tensors of one Megatron parameter, and the shape of a rank's part."""

    layout: Layout
    tensors: list[torch.Tensor]
    shard_shape: tuple[int, ...]
    attention: AttentionShape
    vocab_size: int
    tp_size: int


def attentions(tp_size: int) -> st.SearchStrategy[AttentionShape]:
    """Every attention that Megatron splits over `tp_size` ranks: also fewer query groups than ranks."""
    return st.builds(
        lambda groups, per_group, head_dim: AttentionShape(groups * per_group, groups, head_dim),
        st.integers(1, 12),
        st.integers(1, 6),
        st.integers(1, 4),
    ).filter(lambda attention: not tensor_parallel_faults(attention, 0, tp_size))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout = draw(st.sampled_from(list(Layout)))
    tp_size = draw(st.integers(1, 4))
    attention = draw(attentions(tp_size))
    width, part = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    vocab_size = draw(st.integers(1, tp_size * part))
    columns = draw(st.sampled_from([(), (width,)]))  # weights and biases
    queries, keys = (count * attention.head_dim for count in (attention.heads, attention.groups))
    whole, shard = {
        Layout.REPLICATED: ([(part, *columns)], (part, *columns)),
        Layout.COLUMNS: ([(width, tp_size * part)], (width, part)),
        Layout.VOCABULARY: ([(vocab_size, width)], (part, width)),
        Layout.GATE_UP: ([(tp_size * part, *columns)] * 2, (2 * part, *columns)),
        Layout.QKV: (
            [(queries, *columns), (keys, *columns), (keys, *columns)],
            ((queries + 2 * keys) // tp_size, *columns),
        ),
    }[layout]
    first = 0
    tensors = []
    for shape in whole:  # every value is different
        size = torch.Size(shape).numel()
        tensors.append(torch.arange(first, first + size, dtype=torch.float32).reshape(shape))
        first += size
    return Case(layout, tensors, shard, attention, vocab_size, tp_size)


def shards_of(case: Case) -> list[torch.Tensor]:
    shape = torch.Size(case.shard_shape)
    return [
        to_shard(case.layout, case.tensors, shape, case.attention, case.vocab_size, rank)
        for rank in range(case.tp_size)
    ]


@given(cases())
@settings(deadline=None)
def test_shards_have_megatrons_shape_and_give_the_tensors_back(case: Case) -> None:
    shards = shards_of(case)
    assert all(tuple(shard.shape) == case.shard_shape for shard in shards)
    restored = from_shards(case.layout, shards, case.attention, case.vocab_size)
    assert len(restored) == len(case.tensors)
    for tensor, expected in zip(restored, case.tensors, strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.is_contiguous()


@given(cases())
@settings(deadline=None)
def test_together_the_shards_are_the_whole_parameter(case: Case) -> None:
    """Splitting for one rank and splitting for many hold the same values; a vocabulary's padding is zero."""
    values = torch.cat([shard.flatten() for shard in shards_of(case)])
    expected = torch.cat([tensor.flatten() for tensor in case.tensors])
    if case.layout is Layout.REPLICATED:
        expected = expected.repeat(case.tp_size)
    if case.layout is Layout.VOCABULARY:
        expected = torch.cat([expected, expected.new_zeros(len(values) - len(expected))])
    assert torch.equal(values.sort().values, expected.sort().values)


def test_queries_keys_and_values_are_interleaved_by_group() -> None:
    """Megatron's order: for each KV head its query heads, then the key, then the value."""
    query = torch.tensor([[10.0], [11.0], [12.0], [13.0]])
    key, value = torch.tensor([[20.0], [21.0]]), torch.tensor([[30.0], [31.0]])
    attention = AttentionShape(heads=4, groups=2, head_dim=1)
    fused = to_shard(Layout.QKV, [query, key, value], torch.Size([8, 1]), attention, 0, 0)
    assert fused.flatten().tolist() == [10, 11, 20, 30, 12, 13, 21, 31]


def test_reading_from_a_file_equals_reading_from_memory(tmp_path) -> None:
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    save_file({"table": table}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for rank in range(4):  # 16 padded rows: the third rank's part is half padding, the last one's all
            shape = torch.Size([4, 3])
            lazy = to_shard(Layout.VOCABULARY, [file.get_slice("table")], shape, ANY_ATTENTION, 7, rank)
            assert torch.equal(lazy, to_shard(Layout.VOCABULARY, [table], shape, ANY_ATTENTION, 7, rank))


@pytest.mark.parametrize(
    ("heads", "groups", "tp_size", "cut"),
    [
        (4, 1, 2, [["q0", "q1", "q2"], ["q3", "k0", "v0"]]),
        (8, 2, 4, [["q0", "q1", "q2"], ["q3", "k0", "v0"], ["q4", "q5", "q6"], ["q7", "k1", "v1"]]),
        (6, 1, 4, [["q0", "q1"], ["q2", "q3"], ["q4", "q5"], ["k0", "v0"]]),
    ],
)
def test_fewer_key_value_heads_than_ranks(heads: int, groups: int, tp_size: int, cut: list[list[str]]) -> None:
    """As Megatron cuts its fused rows then: no copies, and a group's heads lie where they fall."""
    names = [f"{part}{i}" for part, count in (("q", heads), ("k", groups), ("v", groups)) for i in range(count)]
    numbers = torch.arange(float(len(names)))[:, None].split([heads, groups, groups])
    shape = torch.Size([len(names) // tp_size, 1])
    attention = AttentionShape(heads, groups, head_dim=1)
    shards = [to_shard(Layout.QKV, numbers, shape, attention, 0, rank) for rank in range(tp_size)]
    assert [[names[int(value)] for value in shard.flatten()] for shard in shards] == cut


@pytest.mark.parametrize(
    ("attention", "tp_size", "named"),
    [
        (AttentionShape(6, 3, 8), 2, r"--tensor-model-parallel-size 2 must be a divisor or a multiple of .* \(3\)"),
        (AttentionShape(6, 2, 8), 4, r"--tensor-model-parallel-size 4 does not divide .*attention heads \(6\)"),
        (AttentionShape(4, 1, 1), 4, r"--tensor-model-parallel-size 4 does not divide the rows .* \(6\)"),
        (AttentionShape(10, 5, 8), 5, r"--tensor-model-parallel-size 5 does not divide the MLP's size \(96\)"),
    ],
)
def test_a_tp_size_that_cannot_be_is_named(attention: AttentionShape, tp_size: int, named: str) -> None:
    [fault] = tensor_parallel_faults(attention, 96, tp_size)
    assert re.fullmatch(named + ".*", fault)


def save_tiny(folder: Path, names: set[str]) -> None:
    """A one-layer Llama's config and, for each of `names`, a tensor."""
    LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(folder)
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")


def test_a_file_with_other_tensors_than_the_configs_is_refused(tmp_path: Path) -> None:
    maps = tensor_maps(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True))
    names = {name for entry in maps for name in entry.hf}
    # A tied model's file may repeat the embedding, and old files hold the rotary frequencies.
    harmless = {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    save_tiny(tmp_path, names - {"model.norm.weight"} | harmless | {"model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], unexpected \['model.layers.1.mlp.up_proj"):
        load_hf_weights([], tmp_path)


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} .*model.safetensors"):
        load_hf_weights([], tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_tensor_is_named_twice_in_a_table(name: str) -> None:
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[name]
    maps = tensor_maps(config(num_hidden_layers=3, tie_word_embeddings=False))
    megatron_names = [entry.megatron for entry in maps]
    hf_names = [hf_name for entry in maps for hf_name in entry.hf]
    assert len(set(megatron_names)) == len(megatron_names)
    assert len(set(hf_names)) == len(hf_names)


def test_head_dim_may_differ_from_the_hidden_sizes_share() -> None:
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    assert attention_shape(config) == AttentionShape(heads=4, groups=2, head_dim=32)


def test_arguments_of_a_llama3() -> None:
    config = LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True
    )
    arguments = " ".join(megatron_arguments_from_hf(config))
    for expected in (
        *("--num-layers 32", "--num-query-groups 8", "--vocab-size 128256", "--rotary-base 500000"),
        "--use-rope-scaling --rope-scaling-factor 32.0",
    ):
        assert expected in arguments
    assert "--untie-embeddings-and-output-weights" not in arguments


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(), r"model_type 'mistral' .* not supported; supported are llama .*qwen2 .*qwen3"),
        (LlamaConfig(attention_bias=True), "attention_bias=True"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act='gelu'"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope_type 'linear'"),
        (LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4 + 0.5}), "rope_theta 10000.5"),
    ],
)
def test_what_megatron_cannot_do_is_refused_by_name(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        megatron_arguments_from_hf(config)
