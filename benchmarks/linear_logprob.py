"""From hidden states and output weight to log-probs and back: projection and log-prob op together.

    python benchmarks/linear_logprob.py --json benchmarks/results/linear_logprob_cpu.json
    python benchmarks/linear_logprob.py --device cuda --rows 8192 --hidden 4096 --vocab 131072 --json FILE

"ours" projects once into float32 logits, which the log-prob op consumes; "ours chunked" holds a chunk of logits at a time
and computes it again in backward. torch's round the logits to bf16. On a GPU also Liger's and Apple's fused linear cross
entropy, where installed. The floor is three matrix products (forward, and the gradients of both inputs) at the speed of a
large one.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import (
    Case,
    added_peak_gb,
    describe_machine,
    format_table,
    gemm_peak,
    number_format,
    time_interleaved,
    write_report,
)
from torch import Tensor

from megatron_sip.kernels.fp32_lm_head import fp32_lm_head
from megatron_sip.kernels.linear_logprob import linear_token_logprobs
from megatron_sip.kernels.logprob import token_logprobs

DTYPE = number_format()
OURS, CHUNKED, TORCH = "ours", "ours chunked", "torch"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, H], weight [V, H], targets [T]) -> minus the sum of the targets' log-probs."""


def our_losses(rows: int, device: str) -> dict[str, Loss]:
    entries = torch.arange(rows, device=device)

    def projected(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -token_logprobs(fp32_lm_head(hidden, weight), entries, targets).sum()

    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_token_logprobs(hidden, weight, entries, targets).sum()

    return {OURS: projected, CHUNKED: chunked}


def torch_losses() -> dict[str, Loss]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")

    return {TORCH: loss, f"{TORCH} compiled": torch.compile(loss, dynamic=False)}


def fused_losses() -> dict[str, Loss]:
    """Of the libraries for GPUs that are installed."""
    losses: dict[str, Loss] = {}
    if importlib.util.find_spec("liger_kernel") is not None:
        liger = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        losses["liger"] = lambda hidden, weight, targets: liger(hidden, weight, targets, reduction="sum")
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        losses["cut-cross-entropy"] = lambda hidden, weight, targets: cut(hidden, weight, targets, reduction="sum")
        # Its default leaves small gradients out.
        losses["cut-cross-entropy, all gradients"] = lambda hidden, weight, targets: cut(
            hidden, weight, targets, reduction="sum", filter_eps=None
        )
    return losses


def error_against_float64(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of the mean log-prob, in nats."""
    hidden, weight, targets = inputs
    logits = hidden.detach().double() @ weight.detach().double().T
    exact = F.cross_entropy(logits, targets, reduction="sum")
    return float((loss(*inputs).double() - exact).abs()) / len(targets)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.rows, args.hidden, generator=generator)
    weight = torch.randn(args.vocab, args.hidden, generator=generator) * 3 / args.hidden**0.5
    hidden, weight = (t.to(args.device, DTYPE).requires_grad_() for t in (hidden, weight))
    targets = torch.randint(0, args.vocab, (args.rows,), generator=generator).to(args.device)
    inputs = (hidden, weight, targets)
    losses = our_losses(args.rows, args.device) | torch_losses() | (fused_losses() if args.device == "cuda" else {})

    def case(name: str, loss: Loss) -> Case:
        return Case(name, lambda: torch.autograd.grad(loss(*inputs), (hidden, weight)))

    cases = [case(name, loss) for name, loss in losses.items()]
    timings = time_interleaved(cases, rounds=args.rounds, warmup=1, device=args.device)
    peak_flops = gemm_peak(DTYPE, args.device)
    floor = 6 * args.rows * args.hidden * args.vocab / peak_flops
    rows = [
        {
            "name": entry.name,
            "median_s": timings[entry.name].median_s,
            "peak_gb": added_peak_gb(entry, args.device),
            "vs_floor": timings[entry.name].median_s / floor,
            "error": error_against_float64(losses[entry.name], inputs),
        }
        for entry in cases
    ]
    seconds = {row["name"]: row["median_s"] for row in rows}
    peers = {name: value for name, value in seconds.items() if name not in (OURS, CHUNKED)}
    return {
        "machine": describe_machine(args.device),
        "shape": {
            "rows": args.rows,
            "hidden": args.hidden,
            "vocab": args.vocab,
            "dtype": str(DTYPE).removeprefix("torch."),
        },
        "gemm_peak_flops": peak_flops,
        "floor_s": floor,
        "rows": rows,
        "ratios": {f"{name} / {OURS}": value / seconds[OURS] for name, value in peers.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=1024, help="hidden states")
    parser.add_argument("--hidden", type=int, default=576, help="width; the defaults are SmolLM2-135M's")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the report goes")
    args = parser.parse_args()
    report = measure(args)
    header = ("forward + backward", "ms", "x floor", "added peak GB", "error (nats)")
    lines = [(r["name"], 1e3 * r["median_s"], r["vs_floor"], r["peak_gb"], f"{r['error']:.0e}") for r in report["rows"]]
    print(format_table(header, lines))
    if args.json:
        write_report(args.json, report)


if __name__ == "__main__":
    main()
