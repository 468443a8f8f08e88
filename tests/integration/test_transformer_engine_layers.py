"""The policy over layers of Transformer Engine's shape, with stand-ins for its modules, against transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from workers import TINY_LLAMA, run_worker

WORKER = Path(__file__).with_name("transformer_engine_worker.py")
VOCABULARY = TINY_LLAMA["vocab_size"]
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY_LLAMA, head_dim=32)),
}


def make_model(family: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    model = MODELS[family]()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of ones would hide one that is left out
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def make_examples() -> list[dict[str, Any]]:
    rng = random.Random(5)

    def ids(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    return [
        {"prefix": ids(23), "branches": [ids(9), ids(14), ids(1)]},
        {"prefix": ids(11), "branches": [ids(6), ids(17)]},
    ]


def separate_logprobs(model: PreTrainedModel, examples: list[dict[str, Any]]) -> torch.Tensor:
    parts = []
    for example in examples:
        for branch in example["branches"]:
            ids = torch.tensor([example["prefix"] + branch])
            logits = model(ids).logits[0, len(example["prefix"]) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, torch.tensor(branch)[:, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("family", list(MODELS))
def test_logprobs_gradients_and_weights_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model, examples = make_model(family, tmp_path / "hf"), make_examples()
    (tmp_path / "examples.json").write_text(json.dumps(examples))
    run_worker(WORKER, tmp_path / "hf", tmp_path / "examples.json", tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt")
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
    } <= set(result["parameters"])
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in result["parameters"])
    assert not any("core_attention" in name for name in result["parameters"])
    expected = separate_logprobs(model, examples)
    torch.testing.assert_close(result["logprobs"], expected.detach(), rtol=1e-5, atol=1e-5)
    (expected * torch.linspace(-1, 1, len(expected))).sum().backward()
    parameters = dict(model.named_parameters())
    assert result["weights"].keys() == result["gradients"].keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert torch.equal(result["weights"][name], parameter), name
        distance = (result["gradients"][name] - parameter.grad).norm() / parameter.grad.norm()
        assert distance < 1e-5, f"{name}: {distance}"
