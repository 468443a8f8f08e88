"""A Megatron policy outside the trainer, from nothing but an HF config: for the checkpoint converter and for tests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from megatron_sip.hf.families import megatron_arguments_from_hf
from megatron_sip.platform.megatron import machine_arguments, prepare_megatron, rendezvous_store

PRECISION_FLAGS = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"], torch.float32: []}


def initialize_megatron_for(hf_config: Any, flags: Sequence[str] = ()) -> Any:
    """Initialise Megatron for the architecture of a transformers config and return its arguments.

    Precision is the config's `dtype` (float32 when it names none). `flags` are further Megatron flags and win. Once a
    process; without torchrun it is a process group of one.

    Raises:
        ValueError: the architecture or its dtype is not supported.
    """
    precision = PRECISION_FLAGS[precision_of(hf_config)]
    architecture = megatron_arguments_from_hf(hf_config)
    prepare_megatron()
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    fixed = ["--micro-batch-size", "1", "--train-iters", "1", "--lr", "0", "--ckpt-format", "torch_dist"]
    fixed += ["--rerun-mode", "disabled"]  # it wants Megatron's own training loop
    fixed += ["--seq-length", str(hf_config.max_position_embeddings), *precision]
    command_line = sys.argv
    sys.argv = [sys.argv[0], *machine_arguments(), *architecture, *fixed, *flags]
    try:
        args = parse_and_validate_args()
    finally:
        sys.argv = command_line  # Megatron reads no other source
    initialize_megatron(allow_no_cuda=True, store=rendezvous_store())
    return args


def precision_of(hf_config: Any) -> torch.dtype:
    """The config's dtype, float32 when it names none. Raises ValueError for one that Megatron does not train in."""
    dtype = getattr(hf_config, "dtype", None) or torch.float32
    if dtype not in PRECISION_FLAGS:
        raise ValueError(f"dtype {dtype} in the HF config is not supported, only float32, bfloat16 and float16")
    return dtype


def build_policy() -> list[torch.nn.Module]:
    """This rank's model chunks, not wrapped for data parallelism, after `initialize_megatron_for`: only to run forward.

    Megatron keeps the sums that gradients are added to (`main_grad`) in the wrapper.
    """
    from megatron.training.training import get_model

    from megatron_sip.model.gpt import model_provider

    chunks = get_model(model_provider, wrap_with_ddp=False)
    for chunk in chunks:
        chunk.eval()
    return chunks
