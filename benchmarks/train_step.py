"""One training step of SmolLM2-135M in the trainer's number format on CPU: ours packed, ours unpacked, and TRL's DPOTrainer.

    python benchmarks/train_step.py [--json FILE] [--repeats N] [--seconds N] [--variants NAME ...]  # needs the extra `bench`

DPO: 4 pairs of 896 + 128 tokens; a step is reference pass, forward, backward, clipping and optimizer. "packed" is the
trainer as `megatron_sip.train` uses it; "offload" is that with --ref-offload, one copy of the weights less on the
device. "unpacked" is the same trainer on rows in which every branch has a copy of its prefix. "trl" is TRL's own training
loop on the same token ids: weights of that format and AdamW, a reference model, all four pairs in one batch (as we hold
them: no accumulation), no activation checkpoints, scaled-dot-product attention. Ours keeps Megatron's float32 master weights,
moments and gradients. GRPO: one prompt of 1024 tokens with 16 completions of 512, on-policy, no KL term, hence no
reference pass.

Every measurement is a process of its own (peak memory is its highest resident memory, imports and all): one step to warm
up, two where the allocator keeps memory (its heap still grows in the second), and one timed; the variants take turns. The
learning rate is 0, so that every step computes the same; the optimizer works all the same. "heap reuse" is glibc told to
keep freed memory (MALLOC_MMAP_MAX_=0), for all sides alike. "of GEMM peak": the operations of the step's matrix products
over time, as a share of the fastest large product of that format seen on this machine. Losses, log-probs and gradient norms
must agree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, format_table, gemm_peak, heap_reuse_environment, number_format, write_report
from train_step_problem import PROBLEMS, step_flops
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = Path.home() / ".cache" / "megatron_sip" / "SmolLM2-135M-Instruct"
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "heap reuse": heap_reuse_environment()}
TIMEOUT_S = 7200  # by arithmetic TRL's step takes 20 minutes where torch has no bfloat16 instructions
TOLERANCES = {"loss": 2e-3, "logprob": 5e-3, "chosen_logprob": 5e-3, "rejected_logprob": 5e-3, "grad_norm": 3e-2}
"""Relative (of the loss, absolute) differences between variants that bfloat16's eight bits explain."""
ALWAYS = ("loss", "grad_norm")
"""What every variant computes; the log-probs are those of its objective."""


class MeasurementError(SystemExit):
    """A variant failed, or the variants do not compute the same."""


@dataclass(frozen=True)
class Setting:
    """A variant under an allocator."""

    variant: str
    allocator: str

    @property
    def objective(self) -> str:
        return self.variant.split("_")[0]

    @property
    def implementation(self) -> str:
        return self.variant.split("_")[1]

    @property
    def warm_up(self) -> int:
        """Steps before the timed one; a heap that is kept still grows in the second."""
        return 2 if self.allocator == "heap reuse" else 1


SETTINGS = tuple(
    Setting(f"{objective}_{implementation}", allocator)
    for objective, implementations in (("dpo", ("packed", "trl", "unpacked")), ("grpo", ("packed", "unpacked")))
    for allocator in ALLOCATORS
    for implementation in implementations
) + tuple(Setting("dpo_offload", allocator) for allocator in ALLOCATORS)
"""What a round measures, in order: where time runs out, the last are left out."""


@dataclass(frozen=True)
class Row:
    """A line of the report: medians over the repeats."""

    name: str
    allocator: str
    repeats: int
    median_s: float
    fastest_s: float
    slowest_s: float
    reference_s: float | None
    peak_gb: float
    resting_gb: float
    of_gemm_peak: float
    computed: dict[str, float]


def setting_flops(setting: Setting, config: Any) -> float:
    """Operations of one step's matrix products."""
    return step_flops(PROBLEMS[setting.objective], setting.implementation in ("packed", "offload"), config)


def expected_seconds(setting: Setting, runs: Mapping[Setting, Sequence[Mapping[str, Any]]], config: Any) -> float:
    """How long a measurement will take by those made so far: starting up, and its operations at the pace of ours or of
    TRL's where there are any."""

    def is_trl(of: Setting) -> bool:
        return of.implementation == "trl"

    paces, starts = [], []
    for of, made in runs.items():
        step_seconds = max(run["seconds"][0] for run in made)
        paces.append((of, step_seconds / setting_flops(of, config)))
        starts.append(max(run["process_seconds"] for run in made) - (of.warm_up + 1) * step_seconds)
    alike = [pace for of, pace in paces if is_trl(of) == is_trl(setting)] or [pace for _, pace in paces]
    return max(starts) + (setting.warm_up + 1) * setting_flops(setting, config) * max(alike)


def measure(setting: Setting, model: Path, timeout_s: float) -> dict[str, Any]:
    """Run `train_step_variant.py` and return what it measured.

    Raises:
        MeasurementError: with the end of its output when it failed.
        subprocess.TimeoutExpired: it had not ended after `timeout_s`.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = inherited | ALLOCATORS[setting.allocator] | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "train_step_variant.py"), setting.variant]
        command += ["--model", str(model), "--result", str(result)]
        command += ["--warm-up", str(setting.warm_up)]
        start = time.monotonic()
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT
        )
        if done.returncode != 0:
            raise MeasurementError(f"{setting.variant} exited with {done.returncode}:\n{done.stderr[-3000:]}")
        measured: dict[str, Any] = json.loads(result.read_text()) | {"process_seconds": time.monotonic() - start}
    print(
        f"{setting.variant}, {setting.allocator}: {measured['seconds'][0]:.1f} s, {measured['peak_gb']:.1f} GB",
        flush=True,
    )
    return measured


def measure_rounds(
    settings: Sequence[Setting], repeats: int, seconds: float, model: Path
) -> tuple[dict[Setting, list[dict[str, Any]]], float]:
    """The measurements that fit into `seconds`, at least one, and the fastest large product seen meanwhile in FLOP/s."""
    end, config = time.monotonic() + seconds, AutoConfig.from_pretrained(model)
    runs: dict[Setting, list[dict[str, Any]]] = {}
    peak = 0.0
    for _ in range(repeats):
        peak = max(peak, *(gemm_peak(number_format(), size=size) for size in (1024, 2048, 4096)))
        for setting in settings:
            if runs and (expected := expected_seconds(setting, runs, config)) > end - time.monotonic():
                print(f"{setting.variant}, {setting.allocator}: left out, would take {expected:.0f} s", flush=True)
                continue
            left = min(TIMEOUT_S, end - time.monotonic()) if runs else TIMEOUT_S
            try:
                measured = measure(setting, model, left)
            except subprocess.TimeoutExpired:
                print(f"{setting.variant}, {setting.allocator}: left out, had not ended after {left:.0f} s", flush=True)
            else:
                runs.setdefault(setting, []).append(measured)
    return runs, max(peak, gemm_peak(number_format()))


def summarise(setting: Setting, runs: Sequence[Mapping[str, Any]], flops: float, peak: float) -> Row:
    """One row from all repeats of a setting whose step takes `flops` operations."""
    seconds = [second for run in runs for second in run["seconds"]]
    reference = [second for run in runs for second in run["reference_seconds"]]
    median = statistics.median(seconds)
    return Row(
        name=setting.variant,
        allocator=setting.allocator,
        repeats=len(runs),
        median_s=median,
        fastest_s=min(seconds),
        slowest_s=max(seconds),
        reference_s=statistics.median(reference) if reference else None,
        peak_gb=max(run["peak_gb"] for run in runs),
        resting_gb=statistics.median(run["resting_gb"] for run in runs),
        of_gemm_peak=flops / median / peak,
        computed=runs[0]["computed"],
    )


def disagreements(rows: Sequence[Row]) -> list[str]:
    """What differs between the variants of an objective by more than its tolerance, or is not known of all of them."""
    found = []
    for objective in PROBLEMS:
        same = [row for row in rows if row.name.startswith(objective)]
        for name, tolerance in TOLERANCES.items():
            values = {f"{row.name}, {row.allocator}": row.computed[name] for row in same if name in row.computed}
            if len(values) < len(same) and (values or name in ALWAYS):
                found.append(f"{name} of {objective} is known only of {sorted(values)}")
            scale = 1.0 if name == "loss" else max(map(abs, values.values()), default=1.0)
            if values and max(values.values()) - min(values.values()) > tolerance * scale:
                found.append(f"{name} of {objective} differs by more than {tolerance}: {values}")
    return found


def compare(rows: Sequence[Row], allocators: Sequence[str]) -> dict[str, float]:
    """How many times faster, and for memory the share of the other's peak; those under heap reuse say so in their names."""
    seconds = {(row.name, row.allocator): row.median_s for row in rows}
    memory = {(row.name, row.allocator): row.peak_gb for row in rows}
    pairs = {
        "packed_vs_trl": (seconds, "dpo_trl", "dpo_packed"),
        "packed_vs_unpacked": (seconds, "dpo_unpacked", "dpo_packed"),
        "grpo_packed_vs_unpacked": (seconds, "grpo_unpacked", "grpo_packed"),
        "memory_vs_trl": (memory, "dpo_packed", "dpo_trl"),
        "offload_vs_resident_reference": (seconds, "dpo_packed", "dpo_offload"),
        "memory_offload_vs_resident_reference": (memory, "dpo_offload", "dpo_packed"),
    }
    return {
        name if allocator == "default" else f"{name}, {allocator}": values[above, allocator] / values[below, allocator]
        for name, (values, above, below) in pairs.items()
        for allocator in allocators
        if {(above, allocator), (below, allocator)} <= values.keys()
    }


def print_report(rows: Sequence[Row], ratios: Mapping[str, float], peak: float) -> None:
    header = (
        *("variant", "allocator", "s a step", "of it reference", "peak GB"),
        *("at rest", "of GEMM peak", "grad norm", "loss"),
    )
    table = []
    for row in rows:
        reference = "" if row.reference_s is None else f"{row.reference_s:.1f}"
        share = f"{100 * row.of_gemm_peak:.0f}%"
        memory = (f"{row.peak_gb:.1f}", f"{row.resting_gb:.1f}")
        computed = (f"{row.computed['grad_norm']:.2f}", f"{row.computed['loss']:.4f}")
        table.append((row.name, row.allocator, f"{row.median_s:.1f}", reference, *memory, share, *computed))
    print(format_table(header, table))
    print(f"GEMM peak, {number_format()}: {peak / 1e9:.0f} GFLOP/s")
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")


def fetched_model(model: Path) -> Path:
    """`model`, fetched by the demo's tool when it is the default one and not there."""
    if not (model / "config.json").exists():
        if model != MODEL:
            raise MeasurementError(f"--model {model}: no config.json there; it must be a Hugging Face folder")
        subprocess.run([sys.executable, str(ROOT / "tools" / "fetch_smollm2.py"), "--save", str(model)], check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "train_step_cpu.json", help="report file")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each variant and allocator")
    parser.add_argument("--seconds", type=float, default=math.inf, help="leave out what would not end by then")
    variants = list(dict.fromkeys(setting.variant for setting in SETTINGS))
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants, help="measure only these")
    parser.add_argument("--model", type=Path, default=MODEL, help="HF folder; fetched when it is the default")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    model = fetched_model(args.model)
    settings = [setting for setting in SETTINGS if setting.variant in args.variants]
    runs, peak = measure_rounds(settings, args.repeats, args.seconds, model)
    config = AutoConfig.from_pretrained(model)
    rows = [summarise(setting, measured, setting_flops(setting, config), peak) for setting, measured in runs.items()]
    ratios = compare(rows, list(ALLOCATORS))
    print_report(rows, ratios, peak)
    problems = {problem.name: problem.__dict__ for problem in PROBLEMS.values()}
    report = {"machine": describe_machine(), "number_format": str(number_format()), "gemm_peak_flops": peak}
    report["problems"] = problems
    report["left_out"] = [f"{s.variant}, {s.allocator}" for s in SETTINGS if s not in runs]
    write_report(args.json, report | {"rows": [row.__dict__ for row in rows], "ratios": ratios})
    if different := disagreements(rows):
        raise MeasurementError("the variants do not compute the same: " + "; ".join(different))


if __name__ == "__main__":
    main()
