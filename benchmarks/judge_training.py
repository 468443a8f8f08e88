"""What the training of a judge came to: its curves, and its accuracy on held-out records before and after.

    examples/train_judge.sh --run-dir runs/judge
    python benchmarks/judge_training.py runs/judge [--json FILE] [--figure FILE.png]

Reads the run's folder: metrics.jsonl, run.json, records/manifest.json, and what `megatron_sip.judge accuracy` said, as
accuracy_*.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine, format_table, write_report
from matplotlib.figure import Figure

from megatron_sip.evaluation.plots import series
from megatron_sip.evaluation.run_record import read_run_record
from megatron_sip.training.metrics_writer import read_metrics

PHASES = ("rollout", "train", "sync", "total")
CRITERION = "short-quality"
REWARD, FIRST = "score/rollout", "judge/label/first-shown-preferred"
"""Of the rollouts of a step, sampled at T=1 for records that were never trained on: the means of their rewards, and of their
verdicts for the first option."""
MISSING = "judge/verdicts-missing/label"
"""Rollouts that held no verdict: their reward is 0."""
HELD_OUT = {REWARD: f"validation/accuracy/{CRITERION}", FIRST: f"validation/first-option/{CRITERION}"}


def report_of(run_dir: Path) -> dict[str, Any]:
    """Settings, data, medians of the steps, curves and validations of a run's folder."""
    steps = read_metrics(run_dir / "metrics.jsonl")
    trained = [step for step in steps if step["step"] > 0]
    record = read_run_record(run_dir)
    manifest = run_dir / "records" / "manifest.json"
    return {
        "settings": record.settings if record is not None else None,
        "records": json.loads(manifest.read_text()) if manifest.exists() else None,
        "steps": len(trained),
        "training_seconds": round(sum(step["seconds/total"] for step in trained), 1),
        "step_seconds": {
            phase: round(statistics.median(step.get(f"seconds/{phase}", 0.0) for step in trained), 2)
            for phase in PHASES
        },
        "validations": validations(steps),
        "served": {path.stem: json.loads(path.read_text()) for path in sorted(run_dir.glob("accuracy_*.json"))},
        "curves": {
            name: [round(step[name], 4) if name in step else None for step in trained] for name in curve_names(trained)
        },
    }


def validations(steps: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """What a run measured on held-out records, by step."""
    return [
        {name: round(value, 4) for name, value in step.items() if name == "step" or name.startswith("validation/")}
        for step in steps
        if any(name.startswith("validation/") for name in step)
    ]


def curve_names(trained: Sequence[dict[str, float]]) -> list[str]:
    """What is kept of every step."""
    wanted = (REWARD, FIRST, "examples", "grad_norm", "engine_logprob_abs_diff", "loss", "length/rollout", MISSING)
    return [name for name in sorted(trained[0]) if name.startswith(wanted)]


def draw(run_dir: Path, file: Path) -> None:
    """Training's rollouts and the held-out records, over the steps."""
    steps = read_metrics(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, (trained, held_out), label in zip(
        axes, HELD_OUT.items(), ("right verdicts", "verdicts for option 1"), strict=True
    ):
        [name] = [name for name in {n for step in steps for n in step} if name.startswith(trained)]
        axis.plot(*series(steps, name), color="#0b6bbf", linewidth=1.2, label="rollouts in training, T=1")
        axis.plot(*series(steps, held_out), "o", color="#c8541b", label="held-out records, greedy")
        axis.axhline(0.5, color="#59636e", linewidth=0.8, linestyle="--")
        axis.set_ylim(0, 1.02)
        axis.set_ylabel(label)
    axes[0].legend(frameon=False, loc="lower right")
    axes[1].set_xlabel("optimizer step")
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--figure", type=Path, help="where the figure goes")
    args = parser.parse_args()
    report = report_of(args.run_dir)
    for validation in report["validations"]:
        print(format_table(("held-out", f"step {validation['step']}"), list(validation.items())[1:]))
    if args.figure is not None:
        draw(args.run_dir, args.figure)
    if args.json is not None:
        write_report(args.json, {"machine": describe_machine(), **report})


if __name__ == "__main__":
    main()
