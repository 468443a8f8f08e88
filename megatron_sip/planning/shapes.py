"""What a model weighs and computes, from its Hugging Face config.json alone: policies, and judges of any decoder family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.errors import ArgumentError

MODELS = Path(__file__).resolve().parent / "models"
"""Folders with a config.json each, whose names stand for them."""
QUANTISED_BITS = {"mxfp4": 4.25, "fp8": 8.0, "awq": 4.25, "gptq": 4.25}
"""Bits of a weight, with its scales."""
BF16 = 2
"""Bytes of a number."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder with gated MLPs. experts: MLPs of a layer, a token takes `active_experts` of them. bits: of a served weight."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 1
    active_experts: int = 1
    bits: float = 16.0

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.groups)

    @property
    def mlp_parameters(self) -> int:
        """Of one MLP."""
        return 3 * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        """Of one layer, with all its experts; norms and biases are left out."""
        return self.attention_parameters + self.experts * self.mlp_parameters

    @property
    def table_parameters(self) -> int:
        """Of the embedding, or of the output layer."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.table_parameters

    @property
    def served_bytes(self) -> float:
        """Of the weights in a server."""
        return self.parameters * self.bits / 8

    @property
    def kv_bytes(self) -> int:
        """Of keys and values of one token."""
        return 2 * BF16 * self.layers * self.groups * self.head_dim

    def read_bytes(self, batch: float) -> float:
        """Of weights that one decode step of `batch` tokens reads: of experts those that any token takes."""
        touched = self.experts * (1 - (1 - self.active_experts / self.experts) ** max(batch, 1))
        layer = self.attention_parameters + touched * self.mlp_parameters
        return (self.layers * layer + self.table_parameters) * self.bits / 8

    def forward_flops(self, tokens: float, context: float, predicted: float) -> float:
        """Of `tokens` tokens, which attend to `context` others on the average; the output layer is run for `predicted`."""
        active = self.attention_parameters + self.active_experts * self.mlp_parameters
        attention = 4 * self.heads * self.head_dim * context
        return tokens * self.layers * (2 * active + attention) + predicted * 2 * self.table_parameters


def model_folder(name: str) -> Path:
    """The folder of a Hugging Face model, or the one that a name stands for. Raises ArgumentError."""
    for folder in (Path(name), MODELS / name):
        if (folder / "config.json").is_file():
            return folder
    known = ", ".join(sorted(path.name for path in MODELS.iterdir()))
    raise ArgumentError(f"{name}: no folder with a config.json, nor a known size; known are {known}")


def read_shape(folder: Path) -> ModelShape:
    """The shape that config.json tells. Raises ArgumentError, naming what is missing."""
    path = folder / "config.json"
    try:
        return shape_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArgumentError(f"{path}: {type(error).__name__}: {error}; a decoder's config.json is needed") from None


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a config. Raises KeyError for a field that is not there."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    method = (config.get("quantization_config") or {}).get("quant_method", "")
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn=config["moe_intermediate_size"] if "moe_intermediate_size" in config else config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        experts=experts,
        active_experts=config["num_experts_per_tok"] if experts > 1 else 1,
        bits=QUANTISED_BITS.get(method, 16.0),
    )
