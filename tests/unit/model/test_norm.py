"""RMSNorm of the local layers against float64."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.model.norm import RMSNorm, StandaloneRMSNorm

HIDDEN = 64


def config_of(dtype: torch.dtype, sequence_parallel: bool = False) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        params_dtype=dtype,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
    )


def norm_of(dtype: torch.dtype, sequence_parallel: bool = False) -> RMSNorm:
    norm = RMSNorm(config_of(dtype, sequence_parallel), HIDDEN, eps=1e-5)
    torch.nn.init.uniform_(norm.weight.data, 0.5, 1.5)
    return norm


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
def test_a_float32_residual_is_rounded_once(residual: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = norm_of(torch.bfloat16)
    x = (torch.randn(8, 1, HIDDEN) * 30).to(residual)
    normed = norm(x)
    assert normed.dtype == torch.bfloat16
    right = reference(x, norm.weight)
    # Half a unit in the last place of bf16, and a little for float32's own rounding.
    torch.testing.assert_close(
        normed.double(), right, rtol=2**-8 * 1.01 if residual == torch.float32 else 2**-6, atol=0
    )


def test_float32_gradients_reach_a_float32_residual() -> None:
    torch.manual_seed(0)
    norm = norm_of(torch.bfloat16)
    x = torch.randn(8, 1, HIDDEN, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    upstream = torch.randn(8, 1, HIDDEN).bfloat16()
    norm(x).backward(upstream)
    reference(wide, norm.weight.detach()).backward(upstream.double())
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_sequence_parallel_is_marked_on_the_weight() -> None:
    assert norm_of(torch.float32, sequence_parallel=True).weight.sequence_parallel
    assert not norm_of(torch.float32).weight.sequence_parallel


def test_a_standalone_norm_has_transformer_engine_s_checkpoint_entries() -> None:
    norm = StandaloneRMSNorm(config_of(torch.float32), HIDDEN)
    assert set(norm.state_dict()) == {"weight", "_extra_state"}
    norm.load_state_dict({"weight": torch.full((HIDDEN,), 2.0), "_extra_state": torch.zeros(8, dtype=torch.uint8)})
    assert norm.weight.tolist() == [2.0] * HIDDEN
