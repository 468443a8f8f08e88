"""The log-prob op against float64 references, on the compiled kernels and on their pure-torch stand-ins."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sip.kernels import logprob_reference
from megatron_sip.kernels.extension import compiled_devices, extension
from megatron_sip.kernels.linear_logprob import linear_token_logprobs
from megatron_sip.kernels.logprob import target_logits, token_logprobs
from megatron_sip.kernels.logprob_ops import operators

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def entries(rows: int, vocab: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random entries: several on one row, some rows without any."""
    generator = torch.Generator().manual_seed(seed)
    logit_rows = torch.randint(0, max(rows, 1), (count,), generator=generator)
    targets = torch.randint(0, vocab, (count,), generator=generator)
    return logit_rows, targets


def exact(logits: Tensor, logit_rows: Tensor, targets: Tensor) -> Tensor:
    """What the op computes, in float64 and plain autograd."""
    return logits.double().log_softmax(dim=-1)[logit_rows, targets]


def loss(tokens: Tensor) -> Tensor:
    """A function of the log-probs with another coefficient for each of them."""
    return (tokens.double() * torch.linspace(-1.5, 2.0, tokens.numel(), dtype=torch.float64)).sum()


def test_the_compiled_kernels_are_there() -> None:
    assert "CPU" in compiled_devices()
    assert extension is not None
    assert extension.cuda_architectures() in ("", "sm_80,sm_90")


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("vocab", [1, 7, 33, 4099])
def test_values_and_gradients_equal_float64(vocab: int, dtype: torch.dtype, inplace: bool) -> None:
    logit_rows, targets = entries(9, vocab, 12)
    logits = (6 * torch.randn(9, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).to(dtype)
    leaf = logits.clone().requires_grad_()
    tokens = token_logprobs(leaf * 1, logit_rows, targets, inplace=inplace)
    loss(tokens).backward()

    oracle = logits.to(torch.float64, copy=True).requires_grad_()
    expected = exact(oracle, logit_rows, targets)
    loss(expected).backward()

    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert tokens.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (tokens <= 0).all()
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=tolerance)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert leaf.grad is not None
    assert oracle.grad is not None
    # Near probability 1 a target's gradient, 1 - p, is as exact as the float32 log-prob.
    atol = rounding * 1e-2 if dtype == torch.float64 else max(rounding * 1e-2, 5e-8)
    torch.testing.assert_close(leaf.grad.double(), oracle.grad, rtol=rounding, atol=atol)


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_on_a_large_vocabulary(dtype: torch.dtype) -> None:
    """The project's bound: 2e-6 against float64, with logits as spread out as those of a trained model."""
    logit_rows, targets = entries(64, 128256, 128)
    logits = (3 * torch.randn(64, 128256, generator=torch.Generator().manual_seed(2))).to(dtype)
    logits[torch.arange(64), torch.arange(64) * 97] = torch.linspace(0, 25, 64).to(dtype)
    targets[:64] = logit_rows[:64] * 97
    tokens = token_logprobs(logits, logit_rows, targets)
    expected = exact(logits, logit_rows, targets)
    assert (tokens.double() - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("direction", [1, -1])
def test_rising_and_falling_rows(direction: int) -> None:
    """The reference of the online sum moves many times, or never."""
    logits = direction * torch.linspace(-300, 300, 20001)[None].repeat(2, 1)
    logit_rows, targets = torch.tensor([0, 0, 1]), torch.tensor([0, 20000, 10000])
    tokens = token_logprobs(logits, logit_rows, targets)
    torch.testing.assert_close(tokens.double(), exact(logits, logit_rows, targets), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_logits(dtype: torch.dtype, inplace: bool) -> None:
    """-inf (a masked token) has probability and gradient exactly 0; NaN is never hidden."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(3)).to(dtype)
    logits[0, :4500] = -torch.inf
    logits[1, 2500:] = -torch.inf
    logits[2, 17] = torch.nan
    leaf = logits.clone().requires_grad_()
    logit_rows, targets = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([4600, 3, 9, 4999, 4])
    tokens = token_logprobs(leaf * 1, logit_rows, targets, inplace=inplace)
    tokens[torch.tensor([0, 2])].sum().backward()
    expected = exact(logits, logit_rows, targets)
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=2e-6, equal_nan=True)
    assert torch.isnan(tokens[4])
    assert leaf.grad is not None
    assert (leaf.grad[0, :4500] == 0).all()
    assert (leaf.grad[1, 2500:] == 0).all()
    assert torch.isfinite(leaf.grad[:2]).all()


def test_a_row_of_minus_infinity_alone_is_nan_as_in_torch() -> None:
    tokens = token_logprobs(torch.full((1, 40), -torch.inf), *entries(1, 40, 1))
    assert torch.isnan(tokens).all()


@pytest.mark.parametrize("inplace", [True, False])
def test_padded_columns_leave_the_softmax(inplace: bool) -> None:
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    logit_rows, targets = entries(5, 50, 7)
    leaf = logits.clone().requires_grad_()
    tokens = token_logprobs(leaf * 1, logit_rows, targets, vocab_size=50, inplace=inplace)
    loss(tokens).backward()
    oracle = logits.double().requires_grad_()
    expected = exact(oracle[:, :50], logit_rows, targets)
    loss(expected).backward()
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(leaf.grad, oracle.grad.float())  # type: ignore[union-attr]
    assert (leaf.grad[:, 50:] == 0).all()  # type: ignore[index]


@pytest.mark.parametrize(("rows", "count"), [(0, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("inplace", [True, False])
def test_nothing_to_do(rows: int, count: int, inplace: bool) -> None:
    leaf = torch.randn(rows, 11, requires_grad=True)
    logit_rows, targets = entries(rows, 11, count)
    tokens = token_logprobs(leaf * 1, logit_rows, targets, inplace=inplace)
    tokens.sum().backward()
    assert tokens.shape == (count,)
    assert leaf.grad is not None
    assert leaf.grad.shape == (rows, 11)
    assert torch.isfinite(leaf.grad).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 300),
    count=st.integers(0, 25),
    seed=st.integers(0, 2**20),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
)
def test_compiled_kernels_equal_the_torch_ones(
    rows: int, vocab: int, count: int, seed: int, spread: float, dtype: torch.dtype
) -> None:
    logit_rows, targets = entries(rows, vocab, count, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, vocab, dtype=torch.float64, generator=generator)).to(dtype)
    start, columns = seed % 7, max(vocab - seed % 5, 0)
    results = operators.row_statistics(logits, columns)
    expected = logprob_reference.row_statistics(logits, columns)
    normaliser = results[0] + results[1].log()
    torch.testing.assert_close(normaliser, expected[0] + expected[1].log(), rtol=1e-7, atol=1e-6)
    precision = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    grad = torch.randn(len(targets), dtype=torch.float64, generator=generator)
    logprobs = (target_logits(logits, logit_rows, targets, start, columns) - normaliser[logit_rows]).clamp_max(0)
    rest = (logit_rows, targets, logprobs, normaliser, grad, start, columns)
    torch.testing.assert_close(
        operators.gradient(logits, *rest), logprob_reference.gradient(logits, *rest), rtol=precision, atol=precision
    )


def instruction_sets() -> list[str]:
    """The best that this processor runs, and all plainer ones."""
    assert extension is not None
    order = ["avx512", "avx2", "portable"]
    return order[order.index(extension.instruction_set()) :]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [1, 15, 2047, 2048, 2049, 6151])
def test_every_instruction_set_agrees_with_float64(length: int, dtype: torch.dtype) -> None:
    assert extension is not None
    name = DTYPE_NAMES[dtype]
    row = (5 * torch.randn(length, generator=torch.Generator().manual_seed(length))).to(dtype)
    row[length // 2 + 1 :: 3] = -torch.inf
    wide = row.double()
    normaliser = wide.logsumexp(0).item()
    for instruction_set in instruction_sets():
        reference, total = extension.row_statistics(instruction_set, name, row.data_ptr(), length)
        assert reference + torch.tensor(total).log().item() == pytest.approx(normaliser, abs=1e-6)
        out = torch.empty_like(row)
        extension.row_exponentials(instruction_set, name, out.data_ptr(), row.data_ptr(), length, normaliser, -2.0)
        rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(out.double(), -2 * (wide - normaliser).exp(), rtol=rounding, atol=1e-7)
        assert (out[row == -torch.inf] == 0).all()


def test_unknown_instruction_sets_are_refused() -> None:
    assert extension is not None
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        extension.row_statistics("sse9", "float32", torch.zeros(4).data_ptr(), 4)


def test_gradcheck_runs_through_the_registered_op() -> None:
    logit_rows, targets = entries(4, 13, 7)
    logits = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, logit_rows, targets, inplace=False), logits)


def test_opcheck() -> None:
    logit_rows, targets = entries(4, 13, 7)
    logits = torch.randn(4, 13)
    wide = torch.randn(7, dtype=torch.float64)
    rest = (logit_rows, targets, -wide.abs(), torch.randn(4, dtype=torch.float64), wide, 0, 12)
    torch.library.opcheck(
        operators.token_logprobs.default, (logits.clone().requires_grad_(), logit_rows, targets, 0, 13)
    )
    torch.library.opcheck(operators.row_statistics.default, (logits.clone(), 12))
    torch.library.opcheck(operators.gradient.default, (logits.clone(), *rest))
    torch.library.opcheck(operators.gradient_.default, (logits.clone(), *rest))


@pytest.mark.parametrize("inplace", [True, False])
def test_second_derivatives_are_refused(inplace: bool) -> None:
    leaf = torch.randn(4, 13, requires_grad=True)
    tokens = token_logprobs(leaf * 1, *entries(4, 13, 7), inplace=inplace)
    (first,) = torch.autograd.grad(loss(tokens.square()), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable" if inplace else "differentiable once"):
        first.square().sum().backward()


def test_a_second_backward_through_consumed_logits_raises() -> None:
    leaf = torch.randn(4, 13, requires_grad=True)
    logit_rows, targets = entries(4, 13, 7)
    tokens = token_logprobs(leaf * 1, logit_rows, targets)
    tokens.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed by an earlier backward"):
        tokens.sum().backward()


def test_consuming_logits_that_another_op_saved_raises() -> None:
    leaf = torch.randn(4, 13, requires_grad=True)
    logits = leaf * 1
    z_loss = logits.square().sum()
    tokens = token_logprobs(logits, *entries(4, 13, 7))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (tokens.sum() + z_loss).backward()


def test_the_gradient_is_written_into_the_logits() -> None:
    leaf = torch.randn(4, 1000, requires_grad=True)
    logits = leaf * 1
    received: list[int] = []
    logits.register_hook(lambda grad: received.append(grad.data_ptr()))
    token_logprobs(logits, *entries(4, 1000, 7)).sum().backward()
    assert received == [logits.data_ptr()]


def test_a_view_of_the_projection_can_be_consumed() -> None:
    """Megatron's output layer gives [s, b, v]; the op sees a view of it."""
    logit_rows, targets = entries(4, 13, 7)
    leaf = torch.randn(4, 1, 13, requires_grad=True)
    token_logprobs((leaf * 1).view(4, 13), logit_rows, targets).sum().backward()
    expected = leaf.detach().clone().requires_grad_()
    exact(expected[:, 0], logit_rows, targets).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


def test_logits_stay_without_a_gradient_or_ownership() -> None:
    logits = torch.randn(4, 13)
    arguments = entries(4, 13, 7)
    before = logits.clone()
    token_logprobs(logits, *arguments)
    with torch.no_grad():
        token_logprobs((logits.requires_grad_() * 1), *arguments)
    token_logprobs(logits, *arguments, inplace=False).sum().backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [5, 64, 1000])
def test_linear_mode_equals_the_projection_followed_by_the_op(dtype: torch.dtype, chunk: int) -> None:
    logit_rows, targets = entries(6, 60, 9)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 16, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(64, 16, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    tokens = linear_token_logprobs(hidden, weight, logit_rows, targets, vocab_size=60, chunk_columns=chunk)
    loss(tokens).backward()
    wide_hidden, wide_weight = (tensor.detach().double().clone().requires_grad_() for tensor in (hidden, weight))
    expected = exact((wide_hidden @ wide_weight.T)[:, :60], logit_rows, targets)
    loss(expected).backward()
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(hidden.grad.double(), wide_hidden.grad, rtol=tolerance, atol=tolerance)  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=tolerance, atol=tolerance)  # type: ignore[union-attr]


def test_linear_mode_gradcheck() -> None:
    logit_rows, targets = entries(3, 11, 5)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)

    def op(h: Tensor, w: Tensor) -> Tensor:
        return linear_token_logprobs(h, w, logit_rows, targets, chunk_columns=4)

    assert torch.autograd.gradcheck(op, (hidden, weight))


BAD_CALLS = [
    ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"\[T, V\], got shape \[2, 3, 4\]"),
    ({"logits": torch.zeros(4, 13, dtype=torch.int32)}, TypeError, "got torch.int32"),
    ({"logit_rows": torch.tensor([0, 1, 4])}, ValueError, r"logit_rows must lie in \[0, 4\), got values from 0 to 4"),
    ({"logit_rows": torch.tensor([0, 1])}, ValueError, "logit_rows has 2 entries, targets 3"),
    ({"logit_rows": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"one dimension, got shape \[3, 1\]"),
    ({"targets": torch.tensor([0, 1, 13])}, ValueError, r"targets must lie in \[0, 13\), got values from 0 to 13"),
    ({"targets": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "targets must be torch.int64, got torch.float32"),
    ({"vocab_size": 14}, ValueError, "vocab_size 14 does not fit 13 columns"),
    ({"vocab_start": -1}, ValueError, "vocab_start must not be negative, got -1"),
    ({"logits": torch.zeros(4, 13, requires_grad=True)}, ValueError, "leaf.*inplace=False"),
    ({"logits": torch.zeros(13, 4, requires_grad=True).T * 1}, ValueError, "not contiguous"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_arguments_name_the_value(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "logits": torch.zeros(4, 13),
        "logit_rows": torch.tensor([0, 1, 3]),
        "targets": torch.tensor([0, 1, 12]),
    }
    with pytest.raises(error, match=message):
        token_logprobs(**(arguments | change))


def test_the_operators_check_what_they_are_given() -> None:
    logits, rows, targets = torch.zeros(4, 13), torch.tensor([0]), torch.tensor([1])
    with pytest.raises(ValueError, match=r"columns must lie in \[0, 13\], got 14"):
        operators.row_statistics(logits, 14)
    with pytest.raises(ValueError, match="logits must be contiguous"):
        operators.row_statistics(logits.T, 4)
    wide = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"logit_rows\[0\] must lie in \[0, 4\), got 4"):
        operators.gradient(logits, rows + 4, targets, wide, wide.expand(4), wide, 0, 13)
    with pytest.raises(TypeError, match="grad must be Double, got Float"):
        operators.gradient(logits, rows, targets, wide, wide.expand(4), wide.float(), 0, 13)


def fat_binary_architectures(library: bytes) -> set[tuple[str, int]]:
    """("ptx" or "elf", compute capability times ten) of each image in a library's CUDA fat binaries."""
    magic = struct.pack("<I", 0xBA55ED50)
    images = set()
    start = library.find(magic)
    while start >= 0:
        header_bytes, content_bytes = struct.unpack_from("<HQ", library, start + 6)
        entry, end = start + header_bytes, start + header_bytes + content_bytes
        while entry < end:
            kind, entry_header_bytes, image_bytes = struct.unpack_from("<H2xIQ", library, entry)
            images.add(("ptx" if kind == 1 else "elf", struct.unpack_from("<I", library, entry + 28)[0]))
            entry += entry_header_bytes + image_bytes
        start = library.find(magic, end)
    return images


def test_the_library_holds_the_architectures_it_names() -> None:
    """Both GPUs' machine code, and PTX for later ones, where CUDA was built; none where it was not."""
    assert extension is not None
    images = fat_binary_architectures(Path(extension.__file__).read_bytes())
    with_cuda = {("elf", 80), ("elf", 90), ("ptx", 90)}
    assert images == (with_cuda if "CUDA" in compiled_devices() else set())


WITHOUT_EXTENSION = """
import sys
sys.modules["megatron_sip._kernels"] = None
import torch
from megatron_sip.kernels.logprob import token_logprobs
from megatron_sip.kernels.extension import compiled_devices
assert compiled_devices() == ()
leaf = torch.randn(3, 9, requires_grad=True)
rows, targets = torch.tensor([0, 0, 2]), torch.tensor([1, 8, 4])
tokens = token_logprobs(leaf * 1, rows, targets)
(tokens * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
ours, leaf.grad = leaf.grad, None
exact = leaf.log_softmax(-1)[rows, targets]
(exact * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
torch.testing.assert_close(tokens, exact)
torch.testing.assert_close(ours, leaf.grad)
"""


def test_without_the_extension_torch_does_the_same_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("megatron_sip._kernels is not built") == 1
