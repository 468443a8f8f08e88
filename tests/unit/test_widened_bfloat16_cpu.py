"""bfloat16 products and attention by way of float32: exact, whatever their shape, and out of the way of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import _scoped_library
from torch.nn.functional import linear, scaled_dot_product_attention

from megatron_sip.platform import widened_bfloat16_cpu
from megatron_sip.platform.widened_bfloat16_cpu import multiply, register_widened

SIZES = st.sampled_from([0, 1, 2, 3, 17, 40])
BLOCK = 64  # numbers of the right side at a time, so that products of these sizes come in blocks


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with (
        patch.object(widened_bfloat16_cpu, "NUMBERS_A_BLOCK", BLOCK),
        _scoped_library("aten", "IMPL") as library,
    ):
        register_widened(library)
        yield


def whole_numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small ones, whose products float32 adds up exactly in any order: results are equal or wrong."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(*factors: Tensor) -> Tensor:
    left, right = (factor.double() for factor in factors)
    return (left @ right).bfloat16()


@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans())
def test_a_product_is_the_exact_one_rounded_once(
    rows: int, inner: int, columns: int, transposed_left: bool, transposed_right: bool
) -> None:
    left = whole_numbers(inner, rows).T if transposed_left else whole_numbers(rows, inner)
    right = whole_numbers(columns, inner, seed=1).T if transposed_right else whole_numbers(inner, columns, seed=1)
    product = left @ right
    assert product.is_contiguous()
    assert torch.equal(product, exact(left, right))
    assert torch.equal(torch.mm(left, right, out=torch.empty_like(product)), product)


@given(st.integers(0, 3), SIZES, SIZES, SIZES)
def test_batches_of_products(batch: int, rows: int, inner: int, columns: int) -> None:
    left, right = whole_numbers(batch, rows, inner), whole_numbers(batch, columns, inner, seed=1).mT
    assert torch.equal(torch.bmm(left, right), exact(left, right))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (1, 5), ()])
def test_a_bias_is_added_before_rounding(shape: tuple[int, ...]) -> None:
    bias, left, right = whole_numbers(*shape), whole_numbers(4, 300, seed=1), whole_numbers(300, 5, seed=2)
    wanted = (3 * bias.double() - 2 * (left.double() @ right.double())).bfloat16()
    assert torch.equal(torch.addmm(bias, left, right, beta=3, alpha=-2), wanted)
    batches = torch.baddbmm(bias, left.expand(2, -1, -1), right.expand(2, -1, -1), beta=3, alpha=-2)
    assert torch.equal(batches, wanted.expand(2, -1, -1))


def test_beta_of_0_ignores_the_bias() -> None:
    left, right = whole_numbers(2, 4, 6), whole_numbers(2, 6, 5, seed=1)
    unset = torch.full((2, 4, 5), float("nan"), dtype=torch.bfloat16)
    assert torch.equal(torch.baddbmm(unset, left, right, beta=0), exact(left, right))


def test_out_keeps_what_lies_between_its_rows() -> None:
    left, right = whole_numbers(4, 6), whole_numbers(6, BLOCK + 5, seed=1)
    buffer = torch.full((8, BLOCK + 5), 7.0, dtype=torch.bfloat16)
    torch.mm(left, right, out=buffer[::2])
    assert torch.equal(buffer[::2], exact(left, right))
    assert (buffer[1::2] == 7).all()


def test_a_linear_layer_and_its_gradients() -> None:
    x, weight = whole_numbers(3, 4, 6).requires_grad_(), whole_numbers(5, 6, seed=1).requires_grad_()
    grad = whole_numbers(3, 4, 5, seed=2)
    with (
        patch.object(widened_bfloat16_cpu, "multiply", wraps=multiply) as ours,
        _scoped_library("aten", "IMPL") as library,
    ):
        register_widened(library)
        linear(x, weight).backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, exact(grad, weight.detach()))
    assert torch.equal(weight.grad, exact(grad.reshape(-1, 5).T, x.detach().reshape(-1, 6)))
    assert ours.call_count == 3  # the output and two gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_other_numbers_go_torchs_way(dtype: torch.dtype) -> None:
    left, right = whole_numbers(4, 6, dtype=dtype), whole_numbers(6, 5, seed=1, dtype=dtype)
    product = left @ right
    assert product.dtype == dtype
    assert torch.equal(product.bfloat16(), exact(left, right))


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (whole_numbers(4, 6), whole_numbers(5, 6), r"cannot be multiplied \(4x6 and 5x6\)"),
        (whole_numbers(4, 6), whole_numbers(6, 5).float(), "same dtype"),
        (whole_numbers(6), whole_numbers(6, 5), "must be a matrix"),
    ],
)
def test_mistakes_are_told_by_torch(left: Tensor, right: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.mm(left, right)


def test_out_of_another_dtype_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(whole_numbers(4, 6), whole_numbers(6, 5), out=torch.empty(4, 5))


@pytest.mark.parametrize("fast", [True, False])
def test_offered_only_where_bfloat16_is_slow(fast: bool) -> None:
    offer = widened_bfloat16_cpu.offer_widened_bfloat16.__wrapped__
    with (
        patch.object(widened_bfloat16_cpu, "multiplies_bfloat16", lambda: fast),
        patch.object(widened_bfloat16_cpu, "register_widened") as register,
    ):
        assert (offer() is None) == fast
    assert register.called != fast


def test_blocks_of_columns_are_a_product() -> None:
    left, right = whole_numbers(3, 8), whole_numbers(8, 3 * BLOCK + 1, seed=1)
    assert torch.equal(multiply(left, right), exact(left, right))


def attention_inputs(mask_dtype: torch.dtype | None) -> tuple[list[Tensor], Tensor | None]:
    """Query, key and value of 3 heads, 33 queries on 50 keys, and a mask."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, length, 16, generator=generator).bfloat16() for length in (33, 50, 50)]
    if mask_dtype is None:
        return tensors, None
    allowed = torch.rand(2, 1, 33, 50, generator=generator) < 0.7
    return tensors, allowed if mask_dtype == torch.bool else torch.where(allowed, 0.0, -1e9).to(mask_dtype)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.bfloat16])
def test_attention_and_its_gradients(mask_dtype: torch.dtype | None) -> None:
    tensors, mask = attention_inputs(mask_dtype)
    grad = torch.randn(2, 3, 33, 16, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run(dtype: torch.dtype, attention: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        cast_mask = mask.to(dtype) if mask_dtype == torch.bfloat16 and mask is not None else mask
        output = attention(*inputs, attn_mask=cast_mask, scale=0.3)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad.to(dtype))]

    with patch.object(
        widened_bfloat16_cpu, "_attention_backward", wraps=widened_bfloat16_cpu._attention_backward
    ) as ours:
        narrow = run(torch.bfloat16, scaled_dot_product_attention)
    assert ours.call_count == 1
    for ours_narrow, wanted in zip(narrow, run(torch.float64, scaled_dot_product_attention), strict=True):
        assert ours_narrow.dtype == torch.bfloat16
        assert (ours_narrow - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_causal_attention_has_float32_log_sum_exps() -> None:
    query, key, value = (tensor[:, :, :33] for tensor in attention_inputs(None)[0])
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=0.3)
    scores = (0.3 * query.double() @ key.double().mT).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
