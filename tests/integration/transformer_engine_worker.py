"""A policy with layers of Transformer Engine's shape, for test_transformer_engine_layers.

    python tests/integration/transformer_engine_worker.py HF_DIR EXAMPLES.json RESULT.pt

Transformer Engine itself needs a GPU. Here stand-ins take its places in the layer specification that Megatron makes for it: its
interfaces and parameter names (the norms are inside the linear layers that follow them), computed by Megatron's own layers.
EXAMPLES.json: [{"prefix", "branches"}]; they share one row. RESULT.pt: parameters (their names), logprobs [L], the gradients
of the log-probs' weighted sum and the exported weights by HF name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_sip.hf.standalone import initialize_megatron_for
from megatron_sip.model.packing import PackedRow, build_row
from megatron_sip.platform.megatron import prepare_megatron
from megatron_sip.records import Branch, Example


def te_layer_spec(config: Any) -> Any:
    """What `block_submodules` gives where Transformer Engine and a GPU are."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megatron_sip.model import gpt
    from megatron_sip.model.norm import StandaloneRMSNorm

    class NormThenColumnParallelLinear(ColumnParallelLinear):
        """In place of TELayerNormColumnParallelLinear."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.eps = config.layernorm_epsilon

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
            return super().forward(normed, *args, **kwargs)

    class Provider(LocalSpecProvider):
        """In place of TESpecProvider."""

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return NormThenColumnParallelLinear

        def layer_norm(self, *_: Any, **__: Any) -> Any:
            return StandaloneRMSNorm

    config.transformer_impl = "transformer_engine"
    with (
        mock.patch.object(gpt, "HAVE_TE", True),
        mock.patch.object(gpt, "TENorm", StandaloneRMSNorm),
        mock.patch.object(gpt_layer_specs, "TESpecProvider", Provider),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
    ):
        spec = gpt.block_submodules(config)
    config.transformer_impl = "local"
    return spec


def build_policy(hf_dir: str) -> tuple[list[torch.nn.Module], Any]:
    """The model with the folder's weights, and its HF config."""
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.training import get_model
    from transformers import AutoConfig

    from megatron_sip.hf.weights import load_hf_weights
    from megatron_sip.model import gpt

    hf_config = AutoConfig.from_pretrained(hf_dir)
    initialize_megatron_for(hf_config, ["--no-gradient-accumulation-fusion"])  # gradients go to autograd
    spec = te_layer_spec(core_transformer_config_from_args(get_args()))
    with mock.patch.object(gpt, "block_submodules", return_value=spec):
        model = get_model(gpt.model_provider, wrap_with_ddp=False)
    load_hf_weights(model, hf_dir)
    return model, hf_config


def read_row(path: str) -> PackedRow:
    examples = [
        Example(
            task_index=index,
            prefix_ids=entry["prefix"],
            branches=[Branch(ids, "target", "suffix") for ids in entry["branches"]],
        )
        for index, entry in enumerate(json.loads(Path(path).read_text()))
    ]
    length = sum(len(e.prefix_ids) + sum(len(branch.ids) for branch in e.branches) for e in examples)
    return build_row(examples, range(len(examples)), -(-length // 16) * 16, pad_id=0)


def main() -> None:
    hf_dir, examples, result = sys.argv[1:]
    prepare_megatron()
    model, hf_config = build_policy(hf_dir)
    from megatron_sip.hf.weights import export_hf_weights
    from megatron_sip.model.gpt import row_logprobs

    row = read_row(examples)
    logprobs = row_logprobs(model[0], row)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    weights = {name: tensor.clone() for name, tensor in export_hf_weights(model, hf_config) if tensor is not None}
    for parameter in model[0].parameters():
        parameter.data = parameter.grad  # the export then puts gradients under their HF names
    gradients = {name: tensor.clone() for name, tensor in export_hf_weights(model, hf_config) if tensor is not None}
    names = [name for name, _ in model[0].named_parameters()]
    torch.save({"parameters": names, "logprobs": logprobs.detach(), "gradients": gradients, "weights": weights}, result)


if __name__ == "__main__":
    main()
