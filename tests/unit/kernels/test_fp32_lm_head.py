"""Float32 logits of bf16 inputs: exact where bf16 output would round, right gradients."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_sip.kernels import fp32_lm_head as module
from megatron_sip.kernels.fp32_lm_head import fp32_lm_head


@pytest.fixture(params=[1024, 4], ids=["whole", "blocks"], autouse=True)
def rows_a_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward into a `main_grad` over all nine rows at once, and over 4, 4 and 1."""
    monkeypatch.setattr(module, "ROWS_A_BLOCK", request.param)


def inputs(dtype: torch.dtype, vocabulary: int = 131) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(9, 64, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, generator=generator).to(dtype).requires_grad_()
    return hidden, weight


def test_bf16_inputs_lose_nothing_to_rounding() -> None:
    hidden, weight = inputs(torch.bfloat16)
    exact = hidden.double() @ weight.double().T
    logits = fp32_lm_head(hidden, weight)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-4
    assert ((hidden @ weight.T).double() - exact).abs().max() > 0.05  # what a bf16 head would have cost


def test_gradients_in_the_inputs_dtypes() -> None:
    hidden, weight = inputs(torch.bfloat16)
    wide_hidden, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    direction = torch.randn(9, 131, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    fp32_lm_head(hidden, weight).backward(direction.float())
    (wide_hidden @ wide_weight.T).backward(direction.double())
    for narrow, wide in ((hidden, wide_hidden), (weight, wide_weight)):
        assert narrow.grad is not None
        assert wide.grad is not None
        assert narrow.grad.dtype == torch.bfloat16
        assert (narrow.grad.double() - wide.grad).norm() / wide.grad.norm() < 5e-3  # bf16's own precision


def test_gradcheck_in_float64() -> None:
    hidden, weight = inputs(torch.float64)
    assert torch.autograd.gradcheck(fp32_lm_head, (hidden, weight))


def test_no_rows_give_zero_gradients() -> None:
    hidden, weight = inputs(torch.bfloat16)
    fp32_lm_head(hidden[:0], weight).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = inputs(torch.float32)
    fp32_lm_head(hidden, weight.detach()).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("vocabulary", [131, 160])  # torch's products, and our kernel's
def test_the_gradient_of_a_tied_weight_goes_to_its_main_grad(vocabulary: int) -> None:
    hidden, weight = inputs(torch.bfloat16, vocabulary)
    direction = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(1))
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    weight.main_grad = torch.ones(vocabulary, 64)  # type: ignore[attr-defined]
    fp32_lm_head(hidden, weight).backward(direction)
    assert weight.grad is None
    exact = 1 + direction.bfloat16().double().T @ hidden.detach().double()
    assert (weight.main_grad - exact).norm() / exact.norm() < 5e-3  # type: ignore[attr-defined]
    exact = direction.double() @ weight.detach().double()
    assert hidden.grad is not None
    assert (hidden.grad - exact).norm() / exact.norm() < 5e-3


def test_no_narrow_copy_of_the_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(1024, 32).bfloat16().requires_grad_()
    weight = torch.randn(2048, 32).bfloat16().requires_grad_()
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    weight.main_grad = torch.zeros(2048, 32)  # type: ignore[attr-defined]
    logits, direction = fp32_lm_head(hidden, weight), torch.ones(1024, 2048)
    monkeypatch.setattr(module, "ROWS_A_BLOCK", 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        logits.backward(direction)
    largest = max(event.self_cpu_memory_usage for event in recorded.events())
    assert 0 < largest < 1024 * 2048 * 2 / 8
