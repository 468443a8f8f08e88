"""PrefixTreeAttention in the place of Megatron's DotProductAttention: same interface, clear refusals."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.kernels.tree_attention.dense import tree_attention_dense
from megatron_sip.model.attention import PrefixTreeAttention


def make_config(**overrides: Any) -> TransformerConfig:
    fields = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    return TransformerConfig(**{**fields, "attention_dropout": 0.0, "use_cpu_initialization": True, **overrides})


def make_attention(config: TransformerConfig | None = None, **arguments: Any) -> PrefixTreeAttention:
    defaults = {"layer_number": 2, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return PrefixTreeAttention(config or make_config(), **{**defaults, **arguments})


LAYOUT = torch.tensor([[0, 5, 5, 8], [0, 5, 8, 10]], dtype=torch.int32)


def make_inputs(length: int = 12, rows: int = 1) -> list[torch.Tensor]:
    return [torch.randn(length, rows, heads, 16) for heads in (4, 2, 2)]


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_takes_what_megatrons_own_attention_takes(method):
    ours = list(inspect.signature(getattr(PrefixTreeAttention, method)).parameters.values())
    theirs = list(inspect.signature(getattr(DotProductAttention, method)).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :])


@pytest.mark.parametrize(
    ("config", "arguments", "scale"),
    [
        ({}, {}, 0.25),
        ({}, {"softmax_scale": 0.1}, 0.1),
        ({"apply_query_key_layer_scaling": True}, {}, 0.125),
        ({"kv_channels": 16}, {}, 0.25),
    ],
)
def test_forward_is_tree_attention_with_the_configured_scale(config, arguments, scale):
    query, key, value = make_inputs()
    output = make_attention(make_config(**config), **arguments)(query, key, value, LAYOUT)
    expected = tree_attention_dense(query[:, 0], key[:, 0], value[:, 0], LAYOUT, scale)
    assert output.shape == (12, 1, 64)
    assert torch.allclose(output[:, 0], expected.reshape(12, 64), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"attention_dropout": 0.1}, {}, r"--attention-dropout 0 \(got 0.1\)"),
        ({}, {"attention_dropout": 0.2}, r"got 0.2"),
        ({}, {"attn_mask_type": AttnMaskType.padding}, "causal self attention"),
        ({}, {"attention_type": "cross"}, "causal self attention"),
        ({"window_size": (128, 0)}, {}, "sliding window"),
        ({"softmax_type": "learnable"}, {}, "softmax_type learnable"),
        ({"context_parallel_size": 2}, {}, "--context-parallel-size must be 1"),
    ],
)
def test_what_trees_cannot_do_is_refused_when_the_model_is_built(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_attention(make_config(**config), **arguments)


def test_inputs_that_are_no_packed_row_are_refused():
    attention = make_attention()
    with pytest.raises(ValueError, match="--micro-batch-size must be 1, got 2"):
        attention(*make_inputs(rows=2), LAYOUT)
    with pytest.raises(ValueError, match=r"layout, int32 \[B, 4\]; got shape None"):
        attention(*make_inputs(), None)
    with pytest.raises(ValueError, match=r"got shape \(1, 1, 12, 12\)"):
        attention(*make_inputs(), torch.ones(1, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="neither attention_bias nor packed_seq_params"):
        attention(*make_inputs(), LAYOUT, attention_bias=torch.zeros(1))


def test_a_layout_longer_than_the_row_is_refused():
    with pytest.raises(ValueError, match="ends at token 10, the row has 9"):
        make_attention()(*make_inputs(9), LAYOUT)
