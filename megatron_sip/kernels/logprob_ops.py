"""The `megatron_sip::` torch operators behind `kernels/logprob.py`: schemas, shape functions, and who implements them.

A row's statistics are float64: `reference` [T] (a value at most 8 below the row's maximum, -inf without a logit above
-inf) and `sums` [T] (of exp(x - reference)). Only the first `columns` columns count, the others being padding: their
gradient is 0.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from megatron_sip.kernels import logprob_reference
from megatron_sip.kernels.extension import compiled_devices, extension

logger = logging.getLogger(__name__)

NAMESPACE = "megatron_sip"

_GRADIENT = (
    "Tensor logit_rows, Tensor targets, Tensor logprobs, Tensor log_normaliser, Tensor grad, "
    "int vocab_start, int columns) -> "
)
SCHEMAS = {
    "row_statistics": "(Tensor logits, int columns) -> (Tensor, Tensor)",
    "gradient": f"(Tensor logits, {_GRADIENT}Tensor",
    "gradient_": f"(Tensor(a!) logits, {_GRADIENT}()",
}


def _fake_statistics(logits: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float64), logits.new_empty(rows, dtype=torch.float64)


def _fake_gradient(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits)


def _fake_gradient_(logits: Tensor, *_: object) -> None:
    return None


def _refuse_second_derivative(*_: object) -> None:
    raise RuntimeError("log-probs are differentiable once: their gradient has no derivative of its own")


def _register() -> None:
    """Defines the operators, and serves the devices that the extension does not with the pure-torch kernels."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    for device in ("CPU", "CUDA"):
        if device not in compiled_devices():
            for name in SCHEMAS:
                torch.library.impl(f"{NAMESPACE}::{name}", device, getattr(logprob_reference, name))
    for name, shapes in (
        ("row_statistics", _fake_statistics),
        ("gradient", _fake_gradient),
        ("gradient_", _fake_gradient_),
    ):
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes)
    # Out of place the gradient may be part of a graph, where an operator without a formula would count as constant.
    torch.library.register_autograd(f"{NAMESPACE}::gradient", _refuse_second_derivative)
    if extension is None:
        logger.warning(
            "megatron_sip._kernels is not built: log-probs run in pure torch, slowly and with float64 temporaries"
        )


_register()
operators = torch.ops.megatron_sip
