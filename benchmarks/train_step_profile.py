"""What a step of ours in `train_step.py` is made of, by torch's profiler.

    python benchmarks/train_step_profile.py dpo_packed [--model HF_DIR] [--json FILE]

The allocator is the one that the process was started with; `make bench` sets heap reuse.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import describe_machine, format_table, gemm_peak, number_format, write_report
from torch.profiler import ProfilerActivity, profile
from train_step import MODEL, fetched_model
from train_step_problem import PROBLEMS, make_examples
from train_step_variant import build_trainer, unpacked_rows
from transformers import AutoConfig, AutoTokenizer

PARTS = {
    "attention": (
        "megatron_sip::tree_attention",
        "megatron_sip::tree_attention_backward",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "RMSNorm, SwiGLU, rotary": tuple(
        f"megatron_sip::{name}" for name in ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotate")
    ),
    "log-probs": ("megatron_sip::row_statistics", "megatron_sip::gradient_", "megatron_sip::token_logprobs"),
    "optimizer": ("aten::_fused_adamw_", "aten::linalg_vector_norm"),  # and clipping, which is among the sums
}
PRODUCTS = ("aten::mm", "aten::addmm_", "megatron_sip::float_product", "megatron_sip::add_weight_gradient_")
"""Operators by name: ours, and torch's that run where ours do not apply."""


def part_of(name: str, shapes: Sequence[Sequence[int]], vocabulary: int) -> str:
    """Which part of a step an operator with these input shapes belongs to."""
    if name in PRODUCTS:
        of_head = any(vocabulary in shape for shape in shapes)
        return "products of the vocabulary projection" if of_head else "products of the layers"
    return next((part for part, names in PARTS.items() if name in names), "copies, sums, Python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=("dpo_packed", "dpo_unpacked", "grpo_packed", "grpo_unpacked"))
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--json", type=Path, help="where the report goes")
    args = parser.parse_args()
    objective, implementation = args.variant.split("_")
    problem = PROBLEMS[objective]
    model = fetched_model(args.model)
    trainer, reference, pad_id = build_trainer(model, problem, steps=4)
    examples = make_examples(problem, AutoTokenizer.from_pretrained(model))
    rows = unpacked_rows(problem, examples, pad_id)

    def step() -> float:
        start = time.perf_counter()
        if implementation == "packed":
            trainer.train_step(examples, reference, 0)
        else:
            trainer.train_rows(examples, rows, reference, 0)
        return time.perf_counter() - start

    for _ in range(2):
        step()
    unprofiled = step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    seconds: Counter[str] = Counter()
    for event in recorded.key_averages(group_by_input_shape=True):
        seconds[part_of(event.key, event.input_shapes, vocabulary)] += event.self_cpu_time_total / 1e6
    total = sum(seconds.values())
    print(format_table(("part", "s", "share"), [(n, s, f"{100 * s / total:.0f}%") for n, s in seconds.most_common()]))
    print(f"{total:.1f} s profiled, {unprofiled:.1f} s without the profiler, {torch.get_num_threads()} threads")
    if args.json:
        report = {"machine": describe_machine(), "gemm_peak_flops": gemm_peak(number_format()), "variant": args.variant}
        write_report(args.json, report | {"seconds": seconds, "step_s": unprofiled, "profiled_step_s": total})


if __name__ == "__main__":
    main()
