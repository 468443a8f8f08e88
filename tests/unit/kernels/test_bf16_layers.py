"""The compiled bfloat16 layer kernels against float64 and against torch, which they must not be less exact than.

They run on processors with AVX-512 BF16; on others the operators must say so, and the callers take torch's way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from megatron_sip.kernels import bf16_layers
from megatron_sip.kernels.bf16_gemm import KERNELS_USABLE, add_weight_gradient, bf16_gemm, bf16_kernels_apply
from megatron_sip.kernels.extension import extension

EPS = 1e-5
HALF_ULP = torch.finfo(torch.bfloat16).eps / 2
Function = Callable[..., Tensor]

pytestmark = pytest.mark.filterwarnings("error")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def torch_rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    angles = torch.cat([angles, angles], -1)[:, None]
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def add_gradient(main_grad: Tensor, grad: Tensor, hidden: Tensor) -> None:
    torch.ops.megatron_sip.add_weight_gradient_(main_grad, grad, hidden)


def norm_gradient(inverse_rms: Tensor) -> None:
    torch.ops.megatron_sip.rms_norm_backward(random(2, 2, 32), random(2, 2, 32), random(32), inverse_rms)


def product(path: str, a: Tensor, b: Tensor, c: Tensor, chunked: bool, accumulate: bool) -> None:
    """c (+)= a [M, K] times b [K, N] by one path, the operands in rows or in chunks of 32 and 16 columns."""
    rows, pairs, columns = a.shape[0], a.shape[1] // 2, b.shape[1]
    lines = torch.stack([b[::2], b[1::2]], dim=-1)
    left, right = (a.contiguous(), 2 * pairs, 32), (lines, columns, 16)
    if chunked:
        padded = torch.nn.functional.pad(a, (0, -a.shape[1] % 32), value=float("nan"))
        left = (padded.unflatten(1, (-1, 32)).transpose(0, 1).contiguous(), 32, 32 * rows)
        right = (lines.unflatten(1, (-1, 16)).transpose(0, 1).contiguous(), 16, 16 * pairs)
    operands = ((left[0].data_ptr(), *left[1:]), (right[0].data_ptr(), *right[1:]), (c.data_ptr(), c.stride(0)))
    extension.multiply(path, *operands, rows, columns, pairs, accumulate)


def run(function: Function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_as_exact_as_torch(ours: Function, theirs: Function, inputs: list[Tensor], grad: Tensor) -> None:
    results = run(ours, inputs, grad)
    exact = run(theirs, [tensor.double() for tensor in inputs], grad)
    rounded = run(theirs, inputs, grad)
    for own, right, usual in zip(results, exact, rounded, strict=True):
        assert own.shape == right.shape
        assert error(own, right) <= max(1.02 * error(usual, right), HALF_ULP)


if KERNELS_USABLE:

    @settings(max_examples=25, deadline=None)
    @given(rows=st.integers(0, 200), width=st.integers(1, 40), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
    def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
        inputs = [3 * random(rows, 1, 16 * width, dtype=dtype), 1 + 0.1 * random(16 * width, seed=1)]
        grad = random(rows, 1, 16 * width, seed=2)
        results = run(lambda x, w: bf16_layers.rms_norm(x, w, EPS), inputs, grad)
        assert [result.dtype for result in results] == [torch.bfloat16, dtype, torch.bfloat16]
        exact = run(torch_rms_norm, [tensor.double() for tensor in inputs], grad)
        for own, right in zip(results, exact, strict=True):
            assert error(own, right) <= HALF_ULP

    @settings(max_examples=25, deadline=None)
    @given(rows=st.integers(0, 200), width=st.integers(1, 20))
    def test_swiglu(rows: int, width: int) -> None:
        gate_up = 4 * random(rows, 1, 32 * width)
        assert_as_exact_as_torch(bf16_layers.swiglu, torch_swiglu, [gate_up], random(rows, 1, 16 * width, seed=1))

    def test_the_norm_of_a_view_keeps_nothing_beside_it() -> None:
        mixed = random(10, 8, 32).requires_grad_()
        output = bf16_layers.rms_norm(mixed[:, 4:6], random(32), EPS)
        kept = output.grad_fn.saved_tensors[0]  # type: ignore[union-attr]
        assert kept.untyped_storage().nbytes() == kept.nbytes == mixed.nbytes // 4

    def test_outputs_are_those_of_torch() -> None:
        x, weight, gate_up = random(300, 576), 1 + 0.1 * random(576, seed=1), 4 * random(300, 3072)
        same_norm = bf16_layers.rms_norm(x, weight, EPS) == torch_rms_norm(x, weight)
        same_swiglu = bf16_layers.swiglu(gate_up) == torch_swiglu(gate_up)
        assert same_norm.float().mean() > 0.999  # sums in another order round differently now and then
        assert same_swiglu.float().mean() > 0.999

    def test_extreme_gates() -> None:
        gate = torch.tensor([0.0, -0.0, 100.0, -100.0, 3e38, -3e38, float("inf")] + [1.0] * 9)
        gate_up = torch.cat([gate, torch.ones(16)]).bfloat16()
        output, grad = run(bf16_layers.swiglu, [gate_up], torch.ones(16))
        assert torch.equal(output, torch_swiglu(gate_up))
        assert grad[:6].isfinite().all()
        assert bf16_layers.swiglu(torch.full((32,), float("nan")).bfloat16()).isnan().all()

    @pytest.mark.parametrize("path", extension.product_paths())
    @settings(max_examples=150, deadline=None)
    @given(
        rows=st.one_of(st.integers(1, 40), st.sampled_from([48, 63, 64, 65])),
        panels=st.integers(1, 9),
        pairs=st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48, 128])),
        chunked=st.booleans(),
        accumulate=st.booleans(),
    )
    def test_both_kinds_of_products(
        path: str, rows: int, panels: int, pairs: int, chunked: bool, accumulate: bool
    ) -> None:
        a, b = random(rows, 2 * pairs), random(2 * pairs, 16 * panels, seed=1)
        c = random(rows + 1, 16 * panels + 8, seed=2, dtype=torch.float32)
        before = c.clone()
        product(path, a, b, c, chunked, accumulate)
        added = a.double() @ b.double()
        sizes = a.double().abs() @ b.double().abs()
        expected = before[:-1, :-8] * accumulate + added
        assert ((c[:-1, :-8] - expected).abs() <= 1e-6 * (sizes + 1)).all()
        assert torch.equal(c[-1], before[-1])
        assert torch.equal(c[:, -8:], before[:, -8:])

    def test_a_path_that_the_processor_lacks_is_refused() -> None:
        paths = extension.product_paths()
        assert paths in (["dots"], ["dots", "tiles"])
        missing = "units" if "tiles" in paths else "tiles"
        with pytest.raises(ValueError, match=f"no bfloat16 products by '{missing}'"):
            product(missing, random(1, 2), random(2, 16), torch.zeros(1, 16), False, False)

    @settings(max_examples=25, deadline=None)
    @given(rows=st.integers(0, 50), columns=st.integers(1, 600), depth=st.integers(1, 60))
    def test_bf16_gemm(rows: int, columns: int, depth: int) -> None:
        hidden, weight = random(rows, 2 * depth), random(columns, 2 * depth, seed=1)
        product = bf16_gemm(hidden, weight)
        assert product.dtype == torch.float32
        torch.testing.assert_close(product.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)

    @settings(max_examples=25, deadline=None)
    @given(tokens=st.integers(0, 130), heads=st.integers(1, 4), dim=st.sampled_from([32, 64, 96, 128]))
    def test_rotate(tokens: int, heads: int, dim: int) -> None:
        angles = 100 * random(tokens, dim // 2, seed=1, dtype=torch.float32)
        x, grad = random(tokens, heads, dim), random(tokens, heads, dim, seed=2)
        results = run(lambda t: bf16_layers.rotate(t, angles), [x], grad)
        exact = run(lambda t: torch_rotate(t, angles.double()), [x.double()], grad)
        for own, right in zip(results, exact, strict=True):
            assert own.dtype == torch.bfloat16
            assert error(own, right) <= HALF_ULP

    def test_views_are_read_through_their_strides() -> None:
        grad, rows, inverse = random(4, 32), random(4, 32, seed=1), torch.rand(8)[::2]
        backward = torch.ops.megatron_sip.rms_norm_backward
        assert torch.equal(
            backward(grad, rows, random(32), inverse)[0], backward(grad, rows, random(32), inverse.contiguous())[0]
        )
        x, weight = random(20, 64)[:, ::2], random(32, seed=1)
        assert torch.equal(bf16_layers.rms_norm(x, weight, EPS), bf16_layers.rms_norm(x.contiguous(), weight, EPS))
        gate_up = random(64, 20).T
        assert torch.equal(bf16_layers.swiglu(gate_up), bf16_layers.swiglu(gate_up.contiguous()))
        mixed, angles = random(20, 3, 192), random(20, 32, seed=1, dtype=torch.float32)
        heads = mixed[:, :, 64:128]  # as Megatron splits keys from one projection
        assert torch.equal(bf16_layers.rotate(heads, angles), bf16_layers.rotate(heads.contiguous(), angles))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: bf16_layers.swiglu(random(4, 48)), "multiple of 32"),
            (lambda: bf16_layers.swiglu(random(4, 32).float()), "must be bfloat16"),
            (lambda: bf16_layers.rms_norm(random(4, 32), random(16), EPS), r"\[\.\.\., 16\]"),
            (lambda: bf16_layers.rms_norm(random(4, 24), random(24), EPS), "multiple of 16"),
            (lambda: bf16_layers.rms_norm(random(4, 32).double(), random(32), EPS), "bfloat16 or float32"),
            (lambda: norm_gradient(torch.ones(3)), r"inverse_rms must be \[4\], got \[3\]"),
            (lambda: norm_gradient(torch.ones(2, 2)), r"inverse_rms must be \[4\], got \[2, 2\]"),
            (lambda: norm_gradient(torch.ones(4).double()), "inverse_rms must be float32, got Double"),
            (
                lambda: torch.ops.megatron_sip.swiglu_backward(random(2, 32), random(4, 32)),
                r"grad must be \[4, 16\] for gate_up of shape \[4, 32\], got \[2, 32\]",
            ),
            (lambda: torch.ops.megatron_sip.swiglu_backward(random(4, 16).float(), random(4, 32)), "grad must be bf"),
            (lambda: bf16_gemm(random(4, 32), random(5, 16)), r"\[V, H\]"),
            (lambda: bf16_layers.rotate(random(4, 2, 48), random(4, 24).float()), "D a multiple of 32"),
            (lambda: bf16_layers.rotate(random(4, 2, 32), random(5, 16).float()), r"must be \[4, 16\]"),
            (lambda: add_gradient(random(32, 16), random(4, 32), random(4, 16)), "main_grad must be float32"),
            (lambda: add_gradient(random(48, 16).float(), random(4, 48), random(4, 16)), "rows a multiple of 32"),
            (lambda: add_gradient(random(32, 16).float(), random(4, 32), random(5, 16)), r"input \[T, K\]"),
        ],
    )
    def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            call()

    def test_operators_trace() -> None:
        operators = torch.ops.megatron_sip
        x, weight, gate_up = random(5, 32), random(32), random(5, 32)
        inverse = operators.rms_norm(x, weight, EPS)[1]
        for operator, arguments in (
            (operators.rms_norm, (x, weight, EPS)),
            (operators.rms_norm, (x.float(), weight, EPS)),
            (operators.rms_norm_backward, (x, x, weight, inverse)),
            (operators.swiglu, (gate_up,)),
            (operators.swiglu_backward, (random(5, 16), gate_up)),
            (operators.float_product, (x, random(7, 32))),
            (operators.rotate, (random(5, 2, 64), x.float(), x.float(), False)),
            (operators.add_weight_gradient_, (random(32, 16).float(), x, random(5, 16))),
        ):
            torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_only_bfloat16_of_a_fitting_width_takes_the_kernels() -> None:
    assert bf16_kernels_apply(random(32), 32) == KERNELS_USABLE
    assert not bf16_kernels_apply(random(32).float(), 32)
    assert not bf16_kernels_apply(random(24), 24)
    assert not bf16_kernels_apply(random(32).to("meta"), 32)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 31, 33, 100, 1023, 1025, 1100]),
    panels=st.integers(1, 6),
    rows_more=st.sampled_from([0, 1]),  # with which the kernels do not apply
    width=st.integers(1, 5),
)
def test_weight_gradients_are_added_up_in_float32(tokens: int, panels: int, rows_more: int, width: int) -> None:
    grad, hidden = random(tokens, 32 * panels + rows_more), random(tokens, 16 * width, seed=1)
    main_grad = random(32 * panels + rows_more, 16 * width, seed=2, dtype=torch.float32)
    expected = main_grad.double() + grad.double().T @ hidden.double()
    add_weight_gradient(main_grad, grad, hidden)
    assert (main_grad - expected).abs().max() <= 1e-6 * expected.abs().max()
