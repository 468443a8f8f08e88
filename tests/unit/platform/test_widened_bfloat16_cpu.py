"""bfloat16 products and attention by way of float32: exact, whatever their shape, and out of the way of everything else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from megatron_sip.model.logprob_ops import extension
from megatron_sip.platform import widened_bfloat16_cpu

SIZES = st.sampled_from([0, 1, 2, 3, 17, 40])
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Holds a registration; without one torch has its own kernels."""
    registration = extension.WidenedBFloat16()
    yield
    del registration


def whole_numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small ones, whose products float32 adds up exactly in any order: results are equal or wrong."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(*factors: Tensor) -> Tensor:
    left, right = (factor.double() for factor in factors)
    return (left @ right).bfloat16()


def conversions(call: Callable[[], object]) -> int:
    """How many tensors `call` converts to another dtype: torch's own kernels none."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return sum(event.count for event in recorded.key_averages() if event.key == "aten::_to_copy")


def calls(dtype: torch.dtype, rows: int = 4) -> dict[str, Callable[[], object]]:
    """A call of each operator whose kernel is replaced."""
    left, right, bias = (torch.ones(shape).to(dtype) for shape in ((rows, 6), (6, 5), (rows, 5)))
    heads = torch.ones(1, 2, rows, 8).to(dtype)
    grad_heads = torch.ones(1, 2, rows, 8).to(dtype)
    output, lse = flash_attention(heads, heads, heads)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return {
        "mm": lambda: torch.mm(left, right),
        "mm.out": lambda: torch.mm(left, right, out=bias),
        "bmm": lambda: torch.bmm(left[None], right[None]),
        "addmm": lambda: torch.addmm(bias, left, right),
        "baddbmm": lambda: torch.baddbmm(bias, left[None], right[None]),
        "attention": lambda: flash_attention(heads, heads, heads),
        "attention_backward": lambda: backward(grad_heads, heads, heads, heads, output, lse, 0.0, False),
    }


@pytest.mark.parametrize("name", calls(torch.bfloat16))
def test_bfloat16_is_widened_and_nothing_else(name: str) -> None:
    assert conversions(calls(torch.bfloat16)[name]) >= 3
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert conversions(calls(dtype)[name]) == 0
    if "attention" not in name:  # one row alone torch multiplies as fast as it reads
        assert conversions(calls(torch.bfloat16, rows=1)[name]) == 0


def test_torch_gets_its_kernels_back() -> None:
    """In a process of its own: a test that sets up the CPU for Megatron leaves a registration behind in this one."""
    program = """
import test_widened_bfloat16_cpu as test

call = test.calls(test.torch.bfloat16)["mm"]
counts = [test.conversions(call)]
registration = test.extension.WidenedBFloat16()
counts.append(test.conversions(call))
del registration
counts.append(test.conversions(call))
print(counts)
"""
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[-2] == "[0, 3, 0]"


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


@pytest.mark.parametrize("transposed_left", [False, True])
@pytest.mark.parametrize("transposed_right", [False, True])
@pytest.mark.parametrize(("inner", "columns"), [(1100, 1000), (3, 400_000), (400_000, 3), (2100, 1001)])
def test_a_large_right_side_goes_by_blocks(
    inner: int, columns: int, transposed_left: bool, transposed_right: bool
) -> None:
    left = whole_numbers(inner, 3).T if transposed_left else whole_numbers(3, inner)
    right = whole_numbers(columns, inner, seed=1).T if transposed_right else whole_numbers(inner, columns, seed=1)
    assert torch.equal(left @ right, exact(left, right))


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


def test_out_keeps_what_lies_between_its_rows_and_may_be_a_factor() -> None:
    left, right = whole_numbers(4, 6), whole_numbers(6, 6, seed=1)
    buffer = torch.full((8, 6), 7.0, dtype=torch.bfloat16)
    torch.mm(left, right, out=buffer[::2])
    assert torch.equal(buffer[::2], exact(left, right))
    assert (buffer[1::2] == 7).all()
    wanted = exact(left, right)
    assert torch.equal(torch.mm(left, right, out=left), wanted)


def test_a_linear_layer_and_its_gradients() -> None:
    x, weight = whole_numbers(3, 4, 6).requires_grad_(), whole_numbers(5, 6, seed=1).requires_grad_()
    grad = whole_numbers(3, 4, 5, seed=2)
    assert conversions(lambda: linear(x, weight).backward(grad)) == 9  # the output and two gradients
    assert x.grad is not None
    assert weight.grad is not None
    assert torch.equal(x.grad, exact(grad, weight.detach()))
    assert torch.equal(weight.grad, exact(grad.reshape(-1, 5).T, x.detach().reshape(-1, 6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_other_numbers_are_right(dtype: torch.dtype) -> None:
    left, right = whole_numbers(4, 6, dtype=dtype), whole_numbers(6, 5, seed=1, dtype=dtype)
    product = left @ right
    assert product.dtype == dtype
    assert torch.equal(product.bfloat16(), exact(left, right))


def matrix(*shape: int) -> Tensor:
    return whole_numbers(*shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch.mm(matrix(4, 6), matrix(5, 6)), r"cannot be multiplied \(4x6 and 5x6\)"),
        (lambda: torch.mm(matrix(4, 6), matrix(6, 5).float()), "same dtype"),
        (lambda: torch.mm(matrix(6), matrix(6, 5)), "must be a matrix"),
        (lambda: torch.mm(matrix(2, 4, 6), matrix(2, 6, 5)), "must be a matrix"),
        (lambda: torch.mm(matrix(4, 6), matrix(6, 5), out=torch.empty(4, 5)), "dtype"),
        (lambda: torch.bmm(matrix(4, 6), matrix(6, 5)), "must be a 3D tensor"),
        (lambda: torch.bmm(matrix(2, 4, 6), matrix(3, 6, 5)), "Expected size for first two dimensions"),
        (lambda: torch.addmm(matrix(5), matrix(2, 4, 6), matrix(2, 6, 5)), "must be a matrix"),
        (lambda: torch.addmm(matrix(7), matrix(4, 6), matrix(6, 5)), "must match the existing size"),
        (lambda: torch.addmm(matrix(5).float(), matrix(4, 6), matrix(6, 5)), "dtype"),
        (lambda: torch.baddbmm(matrix(5), matrix(4, 6), matrix(6, 5)), "Dimension out of range"),
    ],
)
def test_mistakes_are_told_by_torch(call: Callable[[], object], message: str) -> None:
    with pytest.raises((RuntimeError, IndexError), match=message):
        call()


@pytest.mark.parametrize("fast", [True, False])
def test_offered_only_where_bfloat16_is_slow(fast: bool) -> None:
    offer = widened_bfloat16_cpu.offer_widened_bfloat16.__wrapped__
    with patch.object(widened_bfloat16_cpu, "multiplies_bfloat16", lambda: fast):
        assert isinstance(offer(), type(None) if fast else extension.WidenedBFloat16)


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

    def run(dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        cast_mask = mask.to(dtype) if mask_dtype == torch.bfloat16 and mask is not None else mask
        output = scaled_dot_product_attention(*inputs, attn_mask=cast_mask, scale=0.3)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad.to(dtype))]

    for narrow, wanted in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert narrow.dtype == torch.bfloat16
        assert (narrow - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_causal_attention_has_float32_log_sum_exps() -> None:
    query, key, value = (tensor[:, :, :33] for tensor in attention_inputs(None)[0])
    _, lse = flash_attention(query, key, value, 0.0, True, scale=0.3)
    scores = (0.3 * query.double() @ key.double().mT).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
