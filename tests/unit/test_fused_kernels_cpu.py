"""What Megatron gets for its fused kernels on CPU, against what it computes without them."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.model.bf16_layers import KERNELS_USABLE
from megatron_sip.platform.fused_kernels_cpu import accumulate_weight_gradient, apply_rotary, scale_tensors
from megatron_sip.platform.megatron_cpu import enable_cpu


@pytest.fixture(autouse=True)
def megatron() -> None:
    enable_cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_other_dtypes_is_megatrons(dtype: torch.dtype, interleaved: bool) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    heads, angles = torch.randn(7, 1, 3, 64, dtype=dtype), torch.randn(7, 1, 1, 64)
    expected = _apply_rotary_pos_emb_bshd(heads, angles, rotary_interleaved=interleaved)
    assert torch.equal(apply_rotary(heads, angles, interleaved), expected)


@pytest.mark.parametrize(("rotated", "dim"), [(32, 64), (64, 64), (48, 48)])
def test_rotary_in_bfloat16_is_megatrons_but_for_rounding(rotated: int, dim: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    heads, angles = torch.randn(7, 1, 3, dim).bfloat16(), 9 * torch.randn(7, 1, 1, rotated // 2).repeat(1, 1, 1, 2)
    exact = _apply_rotary_pos_emb_bshd(heads.double(), angles.double())
    megatrons = _apply_rotary_pos_emb_bshd(heads, angles)
    ours = apply_rotary(heads, angles)
    assert ours.shape == megatrons.shape
    assert (ours - exact).norm() <= (megatrons - exact).norm()
    assert torch.equal(ours, megatrons) is not (KERNELS_USABLE and rotated == dim == 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [32, 31])
def test_weight_gradients_are_added(dtype: torch.dtype, rows: int) -> None:
    hidden, grad = torch.randn(40, 16).to(dtype), torch.randn(40, rows).to(dtype)
    main_grad = torch.ones(rows, 16)
    accumulate_weight_gradient(hidden, grad, main_grad)
    exact = 1 + grad.double().T @ hidden.double()
    assert (main_grad - exact).norm() / exact.norm() < (
        1e-6 if dtype == torch.float32 or (rows == 32 and KERNELS_USABLE) else 5e-3
    )


def test_clipping_scales_in_place() -> None:
    gradients = [torch.ones(3), torch.full((2, 2), 4.0)]
    scale_tensors(65536, torch.zeros(1), [gradients, gradients], 0.25)
    assert torch.equal(gradients[0], torch.full((3,), 0.25))
    assert torch.equal(gradients[1], torch.ones(2, 2))


def test_megatron_has_them() -> None:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers

    assert rope_utils.fused_apply_rotary_pos_emb is apply_rotary
    assert layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 is accumulate_weight_gradient
    assert clip_grads.multi_tensor_scale_impl is scale_tensors
