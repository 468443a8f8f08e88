"""What a Hugging Face model family is in Megatron's terms: tensor names, layouts, flags; one declared table a family.

The tables are read in both directions: `weights.load_hf_weights` and `weights.export_hf_weights`. Supported are
dense decoders with RMSNorm, SwiGLU and rotary positions: Llama 2 and 3 (also SmolLM2), Qwen2 and Qwen3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sip.hf.layouts import Layout
from megatron_sip.model.tensor_parallel import AttentionShape


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One Megatron parameter and the HF tensors it holds, in order. `{layer}` is the global layer index from 0."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout

    def at_layer(self, layer: int) -> TensorMap:
        """The same entry with the layer filled in."""
        return TensorMap(self.megatron.format(layer=layer), tuple(n.format(layer=layer) for n in self.hf), self.layout)


@dataclass(frozen=True, slots=True)
class Family:
    """An HF architecture: the tensors inside its layers, and what it has that not all have."""

    architecture: str
    layer: tuple[TensorMap, ...]
    qkv_bias: bool = False
    qk_norm: bool = False


EMBEDDING = TensorMap("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Layout.VOCABULARY)
FINAL_NORM = TensorMap("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.REPLICATED)
OUTPUT = TensorMap("output_layer.weight", ("lm_head.weight",), Layout.VOCABULARY)


def _layer(megatron: str, hf: tuple[str, ...], layout: Layout) -> TensorMap:
    return TensorMap("decoder.layers.{layer}." + megatron, tuple("model.layers.{layer}." + name for name in hf), layout)


def _qkv(suffix: str) -> TensorMap:
    names = tuple(f"self_attn.{part}_proj.{suffix}" for part in "qkv")
    return _layer(f"self_attention.linear_qkv.{suffix}", names, Layout.QKV)


LLAMA_LAYER = (
    _layer("input_layernorm.weight", ("input_layernorm.weight",), Layout.REPLICATED),
    _qkv("weight"),
    _layer("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), Layout.COLUMNS),
    _layer("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), Layout.REPLICATED),
    _layer("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Layout.GATE_UP),
    _layer("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Layout.COLUMNS),
)
QK_NORMS = (
    _layer("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), Layout.REPLICATED),
    _layer("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), Layout.REPLICATED),
)

FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA_LAYER),
    "qwen2": Family("Qwen2ForCausalLM", (*LLAMA_LAYER, _qkv("bias")), qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", (*LLAMA_LAYER, *QK_NORMS), qk_norm=True),
}

QUERIES, KEYS = "num_attention_heads x head_dim", "num_key_value_heads x head_dim"
TENSOR_SHAPES = {
    "embed_tokens.weight": ("vocab_size", "hidden_size"),
    "lm_head.weight": ("vocab_size", "hidden_size"),
    "norm.weight": ("hidden_size",),
    "input_layernorm.weight": ("hidden_size",),
    "post_attention_layernorm.weight": ("hidden_size",),
    "q_proj.weight": (QUERIES, "hidden_size"),
    "k_proj.weight": (KEYS, "hidden_size"),
    "v_proj.weight": (KEYS, "hidden_size"),
    "q_proj.bias": (QUERIES,),
    "k_proj.bias": (KEYS,),
    "v_proj.bias": (KEYS,),
    "o_proj.weight": ("hidden_size", QUERIES),
    "q_norm.weight": ("head_dim",),
    "k_norm.weight": ("head_dim",),
    "gate_proj.weight": ("intermediate_size", "hidden_size"),
    "up_proj.weight": ("intermediate_size", "hidden_size"),
    "down_proj.weight": ("hidden_size", "intermediate_size"),
}
"""The config's fields that are a tensor's sizes, by the end of its name."""

TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine fuses these norms into the linear layer after them; the tables use the unfused names."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's --use-rope-scaling fixes; only the factor is free."""


def family_of(hf_config: Any) -> Family:
    """Raises ValueError, listing what is supported, for any other architecture."""
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        supported = ", ".join(f"{name} ({entry.architecture})" for name, entry in FAMILIES.items())
        architectures = ", ".join(getattr(hf_config, "architectures", None) or ["unknown"])
        raise ValueError(
            f"model_type {hf_config.model_type!r} ({architectures}) is not supported; supported are {supported}"
        )
    return family


def tensor_maps(hf_config: Any) -> list[TensorMap]:
    """All tensors of the model, in the order of the forward pass, which is also the order of pipeline stages."""
    family = family_of(hf_config)
    layers = [entry.at_layer(layer) for layer in range(hf_config.num_hidden_layers) for entry in family.layer]
    return [EMBEDDING, *layers, FINAL_NORM, *([] if hf_config.tie_word_embeddings else [OUTPUT])]


def tensor_shape(name: str, hf_config: Any) -> dict[str, int]:
    """The sizes of an HF tensor, in order, by the fields of the config that they are."""
    shape = attention_shape(hf_config)
    own = {"head_dim": shape.head_dim, QUERIES: shape.heads * shape.head_dim, KEYS: shape.groups * shape.head_dim}
    fields = TENSOR_SHAPES[".".join(name.rsplit(".", 2)[-2:])]
    return {field: own[field] if field in own else getattr(hf_config, field) for field in fields}


def attention_shape(hf_config: Any) -> AttentionShape:
    """The sizes that decide how Megatron interleaves queries, keys and values."""
    heads = hf_config.num_attention_heads
    return AttentionShape(
        heads=heads,
        groups=getattr(hf_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
    )


def megatron_arguments_from_hf(hf_config: Any) -> list[str]:
    """Megatron flags of the architecture in a transformers `PretrainedConfig`.

    They fix the model, the vocabulary and the dropout (none), but neither sequence length nor precision nor
    parallelism. The vocabulary is padded by Megatron to a multiple of --make-vocab-size-divisible-by times the
    tensor-parallel size.

    Raises:
        ValueError: the family or one of its options (named) has no counterpart.
    """
    values = {
        **architecture(hf_config),
        "max_position_embeddings": hf_config.max_position_embeddings,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "init_method_std": hf_config.initializer_range,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tokenizer_type": "NullTokenizer",
        "group_query_attention": True,
        "swiglu": True,
        "disable_bias_linear": True,
    }
    given = {flag_of(name): value for name, value in values.items() if value is not False}
    return [word for flag, value in given.items() for word in ([flag] if value is True else [flag, str(value)])]


def architecture(hf_config: Any) -> dict[str, Any]:
    """What makes two models different ones, by Megatron's names of the arguments: sizes, and what the weights mean.

    Raises:
        ValueError: the family or one of its options (named) has no counterpart.
    """
    family = family_of(hf_config)
    _check_options(hf_config)
    shape = attention_shape(hf_config)
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "vocab_size": hf_config.vocab_size,
        "untie_embeddings_and_output_weights": not hf_config.tie_word_embeddings,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm,
        "norm_epsilon": hf_config.rms_norm_eps,
        **_rotary_arguments(hf_config),
    }


def flag_of(name: str) -> str:
    """The command line's name of one of Megatron's arguments."""
    return "--" + name.replace("_", "-")


def _rotary_arguments(hf_config: Any) -> dict[str, Any]:
    parameters = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    base = parameters.get("rope_theta", 10000.0)
    if base != int(base):
        raise ValueError(f"rope_theta {base} is not a whole number, as Megatron's --rotary-base must be")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported, only 1.0")
    arguments: dict[str, Any] = {"rotary_base": int(base), "use_rope_scaling": kind == "llama3"}
    if kind == "default":
        return arguments
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; supported are 'default' and 'llama3'")
    for name, fixed in LLAMA3_ROPE.items():
        if parameters.get(name, fixed) != fixed:
            raise ValueError(
                f"llama3 rope with {name} {parameters[name]} is not supported: Megatron fixes it at {fixed}"
            )
    return {**arguments, "rope_scaling_factor": float(parameters["factor"])}


def _check_options(hf_config: Any) -> None:
    """Raise ValueError for options of the family that the Megatron model does not have."""
    expected = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "use_sliding_window": False}
    for name, value in expected.items():
        actual = getattr(hf_config, name, value)
        if actual != value:
            raise ValueError(f"{name}={actual!r} in the HF config is not supported, only {value!r}")
    shape = attention_shape(hf_config)
    if shape.heads % shape.groups:
        raise ValueError(f"num_key_value_heads {shape.groups} does not divide num_attention_heads {shape.heads}")
