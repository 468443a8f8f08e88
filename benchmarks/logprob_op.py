"""Forward and backward of the log-prob op against torch's, Megatron's and (on a GPU) Liger's.

    python benchmarks/logprob_op.py --json benchmarks/results/logprob_op_cpu.json
    python benchmarks/logprob_op.py --device cuda --rows 8192 --json benchmarks/results/logprob_op_cuda.json

The floor reads the logits once and rewrites them in place. Each contestant goes from logits to the log-probs' sum and
back to the logits' gradient; "ours" has another coefficient for each branch, as DPO does. On a CPU all is measured twice,
with glibc's default allocator and with one that keeps freed memory: page faults are much of what torch pays.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import (
    Case,
    added_peak_gb,
    copy_bandwidth,
    describe_machine,
    format_table,
    heap_reuse_active,
    heap_reuse_environment,
    time_interleaved,
    write_report,
)
from torch import Tensor

from megatron_sip.kernels.logprob import token_logprobs
from megatron_sip.platform.megatron import prepare_megatron

BRANCH_LENGTH = 128
OURS, TORCH = "ours", "torch"


@dataclass(frozen=True)
class Workload:
    """The problem of one table: `buffer` is refilled from `source` before each run, since most contestants eat it."""

    source: Tensor
    buffer: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor

    def refill(self) -> None:
        self.buffer.copy_(self.source)


class _Projection(torch.autograd.Function):
    """Hands the buffer out as a projection would: not a leaf, and its gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, holder: list[Tensor]) -> Tensor:
        return holder[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros((), device=grad.device), None


def make_workload(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Workload:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(rows, vocab, generator=generator).mul_(3).to(dtype).to(device)
    return Workload(
        source,
        torch.empty_like(source),
        torch.arange(rows).to(device),
        torch.randint(0, vocab, (rows,), generator=generator).to(device),
        torch.linspace(-1, 1, rows // BRANCH_LENGTH).repeat_interleave(BRANCH_LENGTH).to(device),
    )


def our_cases(work: Workload) -> list[Case]:
    seed = torch.zeros((), device=work.buffer.device, requires_grad=True)

    def run(inplace: bool) -> None:
        logits = _Projection.apply(seed, [work.buffer])
        logprobs = token_logprobs(logits, work.rows, work.targets, inplace=inplace)
        (logprobs * work.weights).sum().backward()

    return [
        Case(OURS, lambda: run(True), work.refill),
        Case("ours out of place", lambda: run(False), work.refill),
    ]


def differentiate(work: Workload, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Runs `loss` of the logits backward; the gradient is freed with the graph, as it is in training."""
    seed = torch.zeros((), device=work.buffer.device, requires_grad=True)
    return lambda: loss(_Projection.apply(seed, [work.buffer])).backward()


def torch_cases(work: Workload) -> list[Case]:
    def log_softmax(logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1).gather(1, work.targets[:, None]).sum()

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, work.targets, reduction="sum")

    @torch.compile(dynamic=False)
    def compiled(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), work.targets, reduction="sum")

    return [
        Case(f"{TORCH} log_softmax", differentiate(work, log_softmax), work.refill),
        Case(f"{TORCH} cross_entropy", differentiate(work, cross_entropy), work.refill),
        Case(f"{TORCH} compiled", differentiate(work, compiled), work.refill),
    ]


def megatron_case(work: Workload) -> Case:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    def loss(logits: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits[:, None], work.targets[:, None]).sum()

    return Case("megatron", differentiate(work, loss), work.refill)


def liger_cases(work: Workload) -> list[Case]:
    """Empty where Liger is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return []
    liger = importlib.import_module("liger_kernel.transformers.functional")

    def loss(logits: Tensor) -> Tensor:
        return liger.liger_cross_entropy(logits, work.targets, reduction="sum")

    return [Case("liger", differentiate(work, loss), work.refill)]


def start_megatron(device: str) -> None:
    """One process that is its own tensor-parallel group."""
    prepare_megatron()
    from megatron.core import parallel_state

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def largest_error(work: Workload) -> float:
    """Of our log-probs against float64, on the first rows."""
    some = work.source[:64]
    exact = some.double().log_softmax(dim=-1)
    rows = torch.arange(len(some), device=some.device)
    targets = work.targets[: len(some)]
    ours = token_logprobs(some, rows, targets)
    return (ours.double() - exact[rows, targets]).abs().max().item()


def measure(rows: int, vocab: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case: a row of seconds and memory for every contestant, and how ours compares."""
    device = arguments.device
    work = make_workload(rows, vocab, dtype, device)
    words = work.buffer.view(torch.int32)
    cases = [
        Case("floor", words.bitwise_not_),
        *our_cases(work),
        *torch_cases(work),
        megatron_case(work),
        *(liger_cases(work) if device == "cuda" else []),
    ]
    timings = time_interleaved(cases, rounds=arguments.rounds, warmup=1, device=device)
    peaks = {case.name: added_peak_gb(case, device) for case in cases}
    seconds = {name: timing.median_s for name, timing in timings.items()}
    fastest_torch = min(value for name, value in seconds.items() if name.startswith(TORCH))
    case = f"{rows}x{vocab} {str(dtype).removeprefix('torch.')}"
    if device == "cpu":
        case += f", {'heap reuse' if heap_reuse_active() else 'default'}"
    return {
        "rows": [
            {
                "case": case,
                "name": name,
                "median_s": timing.median_s,
                "fastest_s": timing.fastest_s,
                "slowest_s": timing.slowest_s,
                "peak_gb": peaks[name],
            }
            for name, timing in timings.items()
        ],
        "largest_error": {case: largest_error(work)},
        "ratios": {
            case: {
                "vs_floor": seconds[OURS] / seconds["floor"],
                "vs_megatron": seconds["megatron"] / seconds[OURS],
                "vs_torch": fastest_torch / seconds[OURS],
            }
        },
    }


def show(measured: dict[str, Any]) -> None:
    (case, error), *_ = measured["largest_error"].items()
    print(f"\n{case}: largest error {error:.1e}")
    seconds = {row["name"]: row["median_s"] for row in measured["rows"]}
    lines = [
        (name, value * 1e3, value / seconds["floor"], value / seconds[OURS], peak)
        for name, value, peak in ((row["name"], row["median_s"], row["peak_gb"]) for row in measured["rows"])
    ]
    print(format_table(("forward + backward", "ms", "x floor", "x ours", "added peak GB"), lines), flush=True)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases under this process's allocator."""
    start_megatron(arguments.device)
    report: dict[str, Any] = {"rows": [], "ratios": {}, "largest_error": {}}
    for vocab in arguments.vocab:
        for dtype in arguments.dtypes:
            torch.compiler.reset()
            measured = measure(arguments.rows, vocab, getattr(torch, dtype), arguments)
            show(measured)
            report = join(report, measured)
    bandwidth = {"heap reuse" if heap_reuse_active() else "default": copy_bandwidth(arguments.device) / 1e9}
    return report | {"machine": describe_machine(arguments.device), "copy_bandwidth_gb_s": bandwidth}


def join(report: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one: lists and mappings of both; the machine is the same."""
    return report | {
        name: report[name] + value if isinstance(value, list) else report[name] | value for name, value in more.items()
    }


def measure_in_new_process(allocator: str, command_line: list[str]) -> dict[str, Any]:
    """The allocator is chosen when a process starts."""
    kept = {name: value for name, value in os.environ.items() if name not in heap_reuse_environment()}
    environment = kept | (heap_reuse_environment() if allocator == "heap_reuse" else {})
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *command_line, f"--allocator={allocator}", f"--json={result}"]
        subprocess.run(command, env=environment, check=True, timeout=3600)
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=2048, help="rows of logits, a multiple of 128")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument(
        "--allocator",
        choices=("both", "default", "heap_reuse"),
        default="both",
        help="'both' starts a process for each; the others measure in this one as it is",
    )
    arguments = parser.parse_args()
    if arguments.rows % BRANCH_LENGTH:
        parser.error(f"--rows must be a multiple of {BRANCH_LENGTH}, got {arguments.rows}")
    if arguments.allocator == "both" and arguments.device == "cpu":
        report = join(*(measure_in_new_process(name, sys.argv[1:]) for name in ("default", "heap_reuse")))
        del report["machine"]["heap_reuse"]  # both
    else:
        report = measure_all(arguments)
    if arguments.json:
        write_report(arguments.json, report)


if __name__ == "__main__":
    main()
