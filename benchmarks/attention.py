"""Attention over packed prefix trees against separate causal rows and against a dense mask, forward + backward.

    python benchmarks/attention.py [--json FILE] [--rounds N] [--heads 8] [--key-heads 8] [--head-dim 64] [--device cpu|cuda]
        [--shapes PREFIX+BRANCHESxBRANCH ...]

"separate" gives every branch its own row [prefix; branch] and runs them as one batch of torch's causal attention: what
training without shared prefixes computes. "tree" is what training uses: compiled kernels of our own on a CPU where they run
("tree, torch" then merges torch's flash attention), FlexAttention on a GPU (beside it "tree, flash", variable-length flash
attention in bfloat16). "ideal" is the share of the separate rows' scores that the tree needs; "GEMM peak" the tree's speed as
a share of a large matrix product's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention_flash import FlashTreeAttention
from machine import Case, added_peak_gb, describe_machine, format_table, gemm_peak, time_interleaved, write_report
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sip.kernels.tree_attention.compiled import compiled_kernels_apply
from megatron_sip.kernels.tree_attention.cpu import tree_attention_cpu, tree_attention_merged
from megatron_sip.kernels.tree_attention.dense import tree_attention_dense
from megatron_sip.kernels.tree_attention.flex import FlexTreeAttention

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """One group: a prefix and equally long branches."""

    prefix: int
    branches: int
    branch: int

    @classmethod
    def named(cls, name: str) -> Shape:
        """896+2x128: 2 branches of 128 tokens behind a prefix of 896. Raises ValueError."""
        prefix, branches = name.split("+")
        count, length = branches.split("x")
        return cls(int(prefix), int(count), int(length))

    @property
    def name(self) -> str:
        return f"{self.prefix}+{self.branches}x{self.branch}"

    @property
    def row(self) -> int:
        return self.prefix + self.branches * self.branch

    @property
    def tree_scores(self) -> int:
        """Query-key pairs of one head in the tree."""
        causal = self.prefix * (self.prefix + 1) // 2 + self.branches * self.branch * (self.branch + 1) // 2
        return causal + self.branches * self.branch * self.prefix

    @property
    def separate_scores(self) -> int:
        """Query-key pairs of one head over all separate rows."""
        length = self.prefix + self.branch
        return self.branches * length * (length + 1) // 2

    def layout(self, device: str) -> Tensor:
        starts = range(self.prefix, self.row, self.branch)
        lines = [[0, self.prefix, start, start + self.branch] for start in starts]
        return torch.tensor(lines, dtype=torch.int32, device=device)


DENSE_LIMIT = 4096
"""Tokens of the longest row that the dense mask is measured on: it computes every score."""
SHAPES = (Shape(896, 2, 128), Shape(896, 16, 128), Shape(1920, 2, 128), Shape(1024, 16, 512))


def forward_backward(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """One call: output and the gradients of all inputs for a fixed output gradient."""
    grad = torch.randn_like(attention(*inputs).detach())

    def run() -> None:
        torch.autograd.grad(attention(*inputs), inputs, grad)

    return run


def cases(shape: Shape, dtype: torch.dtype, args: argparse.Namespace) -> list[Case]:
    """The contestants on one shape: ours, separate rows, and the dense mask unless the row is too long for it."""

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, args.head_dim, device=args.device).to(dtype).requires_grad_()

    scale, layout = args.head_dim**-0.5, shape.layout(args.device)
    tree = tree_attention_cpu if args.device == "cpu" else FlexTreeAttention()
    heads = (args.heads, args.key_heads, args.key_heads)
    packed = [leaf(shape.row, h) for h in heads]
    rows = [leaf(shape.branches, h, shape.prefix + shape.branch) for h in heads]
    grouped = args.heads != args.key_heads
    merged = Case(
        "tree, torch", forward_backward(lambda q, k, v: tree_attention_merged(q, k, v, layout, scale), packed)
    )
    contestants = [
        *([merged] if args.device == "cpu" and compiled_kernels_apply(packed[0]) else []),
        *([flash_case(packed, layout, scale)] if args.device == "cuda" and dtype == torch.bfloat16 else []),
        Case("tree", forward_backward(lambda q, k, v: tree(q, k, v, layout, scale), packed)),
        Case(
            "separate",
            forward_backward(
                lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped), rows
            ),
        ),
    ]
    if shape.row <= DENSE_LIMIT:
        dense = forward_backward(lambda q, k, v: tree_attention_dense(q, k, v, layout, scale), packed)
        contestants.append(Case("dense mask", dense))
    return contestants


def flash_case(packed: list[Tensor], layout: Tensor, scale: float) -> Case:
    flash = FlashTreeAttention()
    return Case("tree, flash", forward_backward(lambda q, k, v: flash(q, k, v, layout, scale), packed))


def measure(shape: Shape, dtype_name: str, peak: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the report for one shape and dtype."""
    contestants = cases(shape, DTYPES[dtype_name], args)
    timings = time_interleaved(contestants, rounds=args.rounds, device=args.device)
    peaks = {case.name: added_peak_gb(case, args.device) for case in contestants}
    separate = timings["separate"].median_s
    # Two matrix products forward and five backward, two operations a multiply-add.
    operations = 14 * shape.tree_scores * args.heads * args.head_dim
    rows = []
    for name, timing in timings.items():
        row = {"name": name, "shape": shape.name, "dtype": dtype_name, "median_s": timing.median_s}
        row["peak_gb"] = peaks[name]
        row |= {"fastest_s": timing.fastest_s, "fastest_vs_separate": timing.fastest_s / timings["separate"].fastest_s}
        row |= {"vs_separate": timing.median_s / separate, "ideal": shape.tree_scores / shape.separate_scores}
        row["of_gemm_peak"] = operations / timing.median_s / peak if name.startswith("tree") else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="report file (default: results/attention_DEVICE.json)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", type=Shape.named, nargs="+", default=SHAPES)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    args = parser.parse_args()
    peaks = {name: gemm_peak(DTYPES[name], args.device) for name in args.dtypes}
    rows = [row for dtype in args.dtypes for shape in args.shapes for row in measure(shape, dtype, peaks[dtype], args)]
    header = ("shape", "dtype", "attention", "ms", "vs separate", "ideal", "GEMM peak", "added peak GB")
    table = [
        (
            r["shape"],
            r["dtype"],
            r["name"],
            1e3 * r["median_s"],
            r["vs_separate"],
            r["ideal"],
            r["of_gemm_peak"] or "",
            r["peak_gb"],
        )
        for r in rows
    ]
    print(format_table(header, table))
    ratios = {f"{r['shape']} {r['dtype']}": {"vs_separate": r["vs_separate"]} for r in rows if r["name"] == "tree"}
    settings = {"heads": args.heads, "key_heads": args.key_heads, "head_dim": args.head_dim, "rounds": args.rounds}
    report = {"machine": describe_machine(args.device), "gemm_peak_flops": peaks, "settings": settings}
    write_report(args.json or RESULTS / f"attention_{args.device}.json", report | {"rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
