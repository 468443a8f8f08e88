"""The CUDA kernels' own source, run without a GPU by `emulated_cuda`, against the pure-torch kernels in float64.

What only a GPU can show (speed, its own exp and log, memory ordering) is not shown here; `benchmarks/logprob_op.py
--device cuda` and test_logprob_op do, where there is one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sip.kernels import logprob_reference
from megatron_sip.kernels.logprob import target_logits

ROOT = Path(__file__).parents[3]
EMULATION = Path(__file__).with_name("emulated_cuda")
LOGIT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The enumerators of LogitType in csrc/logits.h."""
GRADIENT_ERROR = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-13}
"""Relative error of a gradient: rounding to the type, or to float32 of the exponents (up to 30) that it is made with."""
STATISTICS_ERROR = {torch.float64: 1e-12}
THREAD_ORDERS = {"reverse": 1, "random": 7}
WIDTHS = (1, 31, 8209)
"""Fewer columns than threads; rows that start off every 16-byte boundary; 128 and 512 threads."""


@dataclass(frozen=True)
class Problem:
    """`logits` [rows, width] of which `columns` count, from `vocab_start` on, and the entries that ask for log-probs."""

    logits: Tensor
    columns: int
    vocab_start: int
    logit_rows: Tensor
    targets: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, width = self.logits.shape
        return rows, width, self.columns

    def on_copy(self) -> Problem:
        return replace(self, logits=self.logits.clone())


def make_problem(width: int, dtype: torch.dtype, *, padding: int = 0) -> Problem:
    """Seven rows: one without an entry, one with more than a warp has threads; targets repeat or are other shards'."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(7, width + padding, generator=generator).mul_(4)
    logits[3, 0] = -torch.inf
    logit_rows = torch.tensor([5, 0, 0, *[2] * 70, 6, 4, 1])
    targets = torch.randint(100, 100 + width, (logit_rows.numel(),), generator=generator)
    targets[60:70] = targets[50:60]
    targets[40], targets[-1] = 99, 100 + width
    return Problem(logits.to(dtype), width, 100, logit_rows, targets)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """logprob_cuda.cu as a C++ library: only kernel<<<...>>>(...) is not C++."""
    folder = tmp_path_factory.mktemp("emulated_cuda")
    source = (ROOT / "csrc/cuda/logprob_cuda.cu").read_text()
    source, launches = re.subn(r"(\w+<T>)<<<(.+?)>>>\(", r"emulated::launch(\1, \2)(", source)
    assert launches == 2
    (folder / "logprob_cuda.cpp").write_text(source)
    # A GPU refuses a load of 16 bytes that is not aligned; here it is an illegal instruction.
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        "-fsanitize=alignment",
    ]
    command += [
        "-fsanitize-undefined-trap-on-error",
        f"-I{EMULATION}",
        *(f"-I{ROOT / folder}" for folder in ("csrc", "csrc/cuda")),
    ]
    command += [f'-DLOGPROB_CUDA_SOURCE="{folder / "logprob_cuda.cpp"}"', str(EMULATION / "launchers.cpp")]
    subprocess.run([*command, "-o", str(folder / "emulated.so")], check=True, timeout=300)
    return ctypes.CDLL(str(folder / "emulated.so"))


def call(function: Callable[..., int], *arguments: Tensor | float) -> None:
    """Tensors as pointers, whole numbers as int64 (the ABI widens the ints among them), others as double."""

    def convert(value: Tensor | float) -> object:
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)

    assert function(*map(convert, arguments)) == 0


def statistics(library: ctypes.CDLL, problem: Problem) -> tuple[Tensor, Tensor]:
    """(reference, sums) by the kernel."""
    reference, sums = torch.full((2, problem.logits.shape[0]), torch.nan, dtype=torch.float64)
    call(library.statistics, LOGIT_TYPES[problem.logits.dtype], problem.logits, *problem.shape, reference, sums)
    return reference, sums


def gradient(
    library: ctypes.CDLL, problem: Problem, out: Tensor, logprobs: Tensor, log_normaliser: Tensor, grad: Tensor
) -> None:
    """The kernel's gradient into `out`."""
    rows = problem.logits.shape[0]
    ordered, order = torch.sort(problem.logit_rows, stable=True)
    begin = torch.searchsorted(ordered, torch.arange(rows + 1))
    entries = (begin, order, problem.targets, logprobs, grad, problem.vocab_start, log_normaliser, out)
    call(library.gradient, LOGIT_TYPES[problem.logits.dtype], problem.logits, *problem.shape, *entries)


@pytest.fixture(params=THREAD_ORDERS)
def kernels(request: pytest.FixtureRequest, library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, whose threads take turns in another order in each case."""
    library.set_thread_order(ctypes.c_int(THREAD_ORDERS[request.param]))
    return library


@pytest.mark.parametrize("dtype", LOGIT_TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_statistics_are_those_of_float64(kernels: ctypes.CDLL, dtype: torch.dtype, width: int) -> None:
    problem = make_problem(width, dtype, padding=5)
    problem.logits[:, width:] = torch.nan  # must not be read
    reference, sums = statistics(kernels, problem)
    expected_reference, expected_sums = logprob_reference.row_statistics(problem.logits, problem.columns)
    found, expected = reference + sums.log(), expected_reference + expected_sums.log()
    assert torch.equal(found.isneginf(), expected.isneginf())  # so the single column of -inf
    assert (found - expected)[expected.isfinite()].abs().max() <= STATISTICS_ERROR.get(dtype, 2e-6)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", LOGIT_TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_are_those_of_float64(kernels: ctypes.CDLL, dtype: torch.dtype, width: int, in_place: bool) -> None:
    problem = make_problem(width, dtype, padding=3)
    reference, sums = logprob_reference.row_statistics(problem.logits, problem.columns)
    log_normaliser = reference + sums.log()
    placed = (problem.logits, problem.logit_rows, problem.targets, problem.vocab_start, problem.columns)
    logprobs = target_logits(*placed) - log_normaliser[problem.logit_rows]
    grad = torch.linspace(-1.5, 2.0, problem.targets.numel(), dtype=torch.float64)
    grad[1:3] = torch.tensor([0.75, -0.75])  # of one row: its coefficient is 0, its targets' gradients are not
    exact = replace(problem, logits=problem.logits.double())
    entries = (exact.logit_rows, exact.targets, logprobs, log_normaliser, grad, exact.vocab_start, exact.columns)
    expected = logprob_reference.gradient(exact.logits, *entries)

    mine = problem.on_copy()
    out = mine.logits if in_place else torch.full_like(mine.logits, torch.nan)
    gradient(kernels, mine, out, logprobs, log_normaliser, grad)
    bound = GRADIENT_ERROR[dtype] * expected.abs() + (2e-7 if dtype == torch.float16 else 1e-30)
    finite = log_normaliser.isfinite()
    assert ((out.double() - expected).abs() <= bound)[finite].all()
    assert (out[:, width:] == 0).all()


def test_what_is_not_a_number_stays_in_its_row(kernels: ctypes.CDLL) -> None:
    problem = make_problem(2049, torch.float32)
    problem.logits[1, 2000] = torch.nan
    problem.logits[4, :] = -torch.inf
    reference, sums = statistics(kernels, problem)
    assert sums[1].isnan()
    assert reference[4] == -torch.inf
    assert sums[4] == 0
    assert sums[[0, 2, 3, 5, 6]].isfinite().all()


def test_rows_of_nothing_are_left_alone(kernels: ctypes.CDLL) -> None:
    empty = replace(make_problem(31, torch.float32), logits=torch.zeros(0, 31))
    reference, sums = statistics(kernels, empty)
    assert reference.numel() == sums.numel() == 0
