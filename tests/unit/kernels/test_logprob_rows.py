"""The row kernels under the log-prob op where their arithmetic is delicate: large, masked and infinite logits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_sip.kernels.extension import extension

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LENGTH = 6151
LOWEST = torch.finfo(torch.float32).min / 2


def instruction_sets() -> list[str]:
    """The best that this processor runs, and all plainer ones."""
    assert extension is not None
    order = ["avx512", "avx2", "portable"]
    return order[order.index(extension.instruction_set()) :]


def spread(seed: int = 0) -> Tensor:
    return 3 * torch.randn(LENGTH, generator=torch.Generator().manual_seed(seed))


def log_normaliser(instruction_set: str, name: str, row: Tensor) -> float:
    assert extension is not None
    reference, total = extension.row_statistics(instruction_set, name, row.data_ptr(), len(row))
    return reference + math.log(total)


def softmax(instruction_set: str, name: str, row: Tensor, normaliser: float) -> Tensor:
    assert extension is not None
    out = torch.empty_like(row)
    extension.row_exponentials(instruction_set, name, out.data_ptr(), row.data_ptr(), len(row), normaliser, 1.0)
    return out


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize(
    ("name", "offset"),
    [(name, offset) for name in DTYPES for offset in (0.0, 1000.0, -1000.0, 30000.0)]
    + [(name, 1e5) for name in DTYPES if name != "float16"],  # float16 ends at 65504
)
def test_an_offset_of_all_logits_costs_no_accuracy(instruction_set: str, name: str, offset: float) -> None:
    row = (spread() + offset).to(DTYPES[name])
    exact = row.double().logsumexp(0).item()
    assert log_normaliser(instruction_set, name, row) == pytest.approx(exact, rel=0, abs=2e-6)
    rounding = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-10}[name]
    found = softmax(instruction_set, name, row, exact)
    torch.testing.assert_close(found.double(), (row.double() - exact).exp(), rtol=rounding, atol=1e-7)


def large_rows() -> dict[str, Tensor]:
    """Logits as masks made of large finite numbers leave them."""
    masked_first, one_huge, rising, falling = spread(), spread(), spread(), spread()
    masked_first[:4500] = LOWEST
    one_huge[5000] = 1e20
    rising[:4500], rising[4500:] = 8e8, 1e9
    falling[:4500], falling[4500:] = -1e9, -8e8
    constants = {str(value): torch.full((LENGTH,), value) for value in (-3e6, 1e8, -1e9, 3e9, 1e30, LOWEST)}
    of_blocks = {"masked first": masked_first, "one huge": one_huge, "rising": rising, "falling": falling}
    return of_blocks | constants


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", large_rows())
def test_large_finite_logits(instruction_set: str, name: str, case: str) -> None:
    assert extension is not None
    row = large_rows()[case].to(DTYPES[name])
    reference, total = extension.row_statistics(instruction_set, name, row.data_ptr(), LENGTH)
    highest = row.max().item()
    shifted_normaliser = (row.double() - highest).logsumexp(0).item()
    if abs(highest) < 1e15:  # float64 resolves the sum
        assert reference - highest + math.log(total) == pytest.approx(shifted_normaliser, rel=0, abs=2e-6)
    found = softmax(instruction_set, name, row, reference + math.log(total))
    expected = (row.double() - highest - shifted_normaliser).exp()
    if abs(highest) < 1e15 or case == "one huge":
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-7)
    else:  # reference + log(sum) is the reference: too large by a factor, but finite
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("name", DTYPES)
def test_nan_is_not_hidden_among_minus_infinities(instruction_set: str, name: str) -> None:
    assert extension is not None
    for finite in (0, LENGTH):
        row = torch.full((LENGTH,), -torch.inf)
        row[:finite] = 1.0
        row[5000] = torch.nan
        row = row.to(DTYPES[name])
        assert math.isnan(extension.row_statistics(instruction_set, name, row.data_ptr(), LENGTH)[1])
        assert torch.isnan(softmax(instruction_set, name, row, math.nan)).all()


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("name", DTYPES)
def test_a_row_of_minus_infinity_alone_has_no_sum(instruction_set: str, name: str) -> None:
    assert extension is not None
    row = torch.full((LENGTH,), -torch.inf, dtype=DTYPES[name])
    assert extension.row_statistics(instruction_set, name, row.data_ptr(), LENGTH) == (-torch.inf, 0.0)


CHOICES = """
import json, torch
from megatron_sip.kernels.extension import extension
from megatron_sip.kernels.logprob_ops import operators
bf16 = [operators.bf16_layers_supported(), operators.tree_attention_supported(), extension.product_paths()]
print(json.dumps([torch.backends.cpu.get_cpu_capability(), extension.instruction_set(), *bf16]))
"""


@pytest.mark.parametrize(("capability", "instruction_set"), [("avx2", "avx2"), ("default", "portable")])
def test_what_bounds_the_instructions_of_torch_bounds_ours(capability: str, instruction_set: str) -> None:
    """So that one variable makes a processor stand in for an older one."""
    if instruction_set not in instruction_sets():
        capability, instruction_set = "default", "portable"
    done = subprocess.run(
        [sys.executable, "-c", CHOICES],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout) == [capability.upper(), instruction_set, False, False, []]
