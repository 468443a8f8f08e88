"""What a Hugging Face model family is in Megatron's terms: tensor names, layouts, flags; one declared table a family.

The tables are read in both directions: `hf_weights.load_hf_weights` and `hf_weights.export_hf_weights`. Supported are
dense decoders with RMSNorm, SwiGLU and rotary positions: Llama 2 and 3 (also SmolLM2), Qwen2 and Qwen3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sip.model.hf_layouts import AttentionShape, Layout


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
    """An HF architecture: its tensors outside and inside the layers, and the Megatron flags it adds."""

    architecture: str
    layer: tuple[TensorMap, ...]
    flags: tuple[str, ...] = ()


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
    "qwen2": Family("Qwen2ForCausalLM", (*LLAMA_LAYER, _qkv("bias")), ("--add-qkv-bias",)),
    "qwen3": Family("Qwen3ForCausalLM", (*LLAMA_LAYER, *QK_NORMS), ("--qk-layernorm",)),
}

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
    family = family_of(hf_config)
    _check_options(hf_config)
    shape = attention_shape(hf_config)
    values = {
        "--num-layers": hf_config.num_hidden_layers,
        "--hidden-size": hf_config.hidden_size,
        "--ffn-hidden-size": hf_config.intermediate_size,
        "--num-attention-heads": shape.heads,
        "--num-query-groups": shape.groups,
        "--kv-channels": shape.head_dim,
        "--max-position-embeddings": hf_config.max_position_embeddings,
        "--normalization": "RMSNorm",
        "--norm-epsilon": hf_config.rms_norm_eps,
        "--position-embedding-type": "rope",
        "--init-method-std": hf_config.initializer_range,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": hf_config.vocab_size,
    }
    flags = ["--group-query-attention", "--swiglu", "--disable-bias-linear", *family.flags]
    if not hf_config.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    pairs = [text for flag, value in values.items() for text in (flag, str(value))]
    return [*pairs, *flags, *_rotary_arguments(hf_config)]


def _rotary_arguments(hf_config: Any) -> list[str]:
    parameters = dict(getattr(hf_config, "rope_parameters", None) or {})
    kind = parameters.get("rope_type", "default")
    base = parameters.get("rope_theta", 10000.0)
    if base != int(base):
        raise ValueError(f"rope_theta {base} is not a whole number, as Megatron's --rotary-base must be")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported, only 1.0")
    arguments = ["--rotary-base", str(int(base))]
    if kind == "default":
        return arguments
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; supported are 'default' and 'llama3'")
    for name, fixed in LLAMA3_ROPE.items():
        if parameters.get(name, fixed) != fixed:
            raise ValueError(
                f"llama3 rope with {name} {parameters[name]} is not supported: Megatron fixes it at {fixed}"
            )
    return [*arguments, "--use-rope-scaling", "--rope-scaling-factor", str(float(parameters["factor"]))]


def _check_options(hf_config: Any) -> None:
    """Raise ValueError for options of the family that the Megatron model does not have."""
    expected = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "use_sliding_window": False}
    for name, value in expected.items():
        actual = getattr(hf_config, name, value)
        if actual != value:
            raise ValueError(f"{name}={actual!r} in the HF config is not supported, only {value!r}")
