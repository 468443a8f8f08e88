"""What Megatron gets for its fused kernels on CPU, against what it computes without them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_sip.kernels.bf16_gemm import KERNELS_USABLE
from megatron_sip.platform.fused_kernels_cpu import accumulate_weight_gradient, apply_rotary, l2_norm, scale_tensors
from megatron_sip.platform.megatron import prepare_megatron


@pytest.fixture(autouse=True)
def megatron() -> None:
    prepare_megatron()


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


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, which Megatron adds norms up over."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_of_a_whole_embedding_are_clipped_to_the_norm_asked_for(alone: None) -> None:
    """SmolLM2's, 49,152 x 576: a sum of squares in float32 is wrong by 2e-3 there, and otherwise for each half of it."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    embedding = torch.nn.Parameter(torch.zeros(49152, 576))
    embedding.grad = torch.randn(49152, 576, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.vector_norm(embedding.grad.double()))
    norm = get_grad_norm_fp32([embedding.grad])
    halves = [get_grad_norm_fp32([half]) for half in embedding.grad.view(-1).tensor_split(2)]
    assert norm == pytest.approx(exact, rel=1e-6)
    assert (halves[0] ** 2 + halves[1] ** 2) ** 0.5 == pytest.approx(exact, rel=1e-6)  # as two ranks share it
    clip_grad_by_total_norm_fp32([embedding], 1.0, norm)
    assert float(torch.linalg.vector_norm(embedding.grad.double())) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_hides_no_bad_gradient(bad: float) -> None:
    gradient = torch.ones(100_000)
    gradient[77_777] = bad
    norm, _ = l2_norm(65536, torch.zeros(1), [[torch.ones(3), gradient.to(torch.bfloat16)]])
    assert not torch.isfinite(norm)


def test_a_norm_of_nothing_is_zero() -> None:
    assert l2_norm(65536, torch.zeros(1), [[]])[0].tolist() == [0.0]


def test_megatron_has_them() -> None:
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers

    assert rope_utils.fused_apply_rotary_pos_emb is apply_rotary
    assert layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 is accumulate_weight_gradient
    assert clip_grads.multi_tensor_scale_impl is scale_tensors
    assert clip_grads.l2_norm_impl is l2_norm
