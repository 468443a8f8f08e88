"""The demo as a user runs it: its time from start to exported model, a step's phases, and what was learnt.

    python benchmarks/demo.py [--avx2] [--json FILE] [--figure FILE.png] [--run-dir DIR]

--avx2 lets a processor with AVX-512 or AMX stand in for one without, by the libraries' own switches. The model must have
been fetched (`tools/fetch_smollm2.py`); nothing else should run beside it. An old run in --run-dir is not continued.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe_machine, format_table, write_report

REPO = Path(__file__).resolve().parents[1]
WITHOUT_AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's kernels, and ours
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
PHASES = ("rollout", "judge", "reference", "train", "sync", "total")
CURVES = ("loss", "score/rollout", "score/suffix", "chosen_rate/rollout", "engine_logprob_abs_diff")


def run_demo(run_dir: Path, switches: dict[str, str]) -> float:
    """Seconds from the command to its end. Raises CalledProcessError."""
    shutil.rmtree(run_dir, ignore_errors=True)
    environment = {**os.environ, **switches, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    began = time.monotonic()
    subprocess.run(["examples/demo.sh", "--run-dir", str(run_dir)], cwd=REPO, env=environment, check=True)
    return time.monotonic() - began


def report_of(run_dir: Path, seconds: float) -> dict[str, Any]:
    """What a run folder says of a demo that took `seconds`: medians of the steps but the first, curves, the win rate."""
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "steps": len(steps),
        "step_seconds": {
            phase: round(statistics.median(step[f"seconds/{phase}"] for step in steps[1:]), 2) for phase in PHASES
        },
        **{
            name: summary[name]
            for name in ("win_rate", "win_rate_ci95", "control", "distinct_3", "suffix_nll", "prompts", "documents")
        },
        "curves": {name: [round(step[name], 4) for step in steps] for name in CURVES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="as on a processor without AVX-512")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--figure", type=Path, help="where the plot of the scores goes")
    parser.add_argument("--run-dir", type=Path, default=REPO / "build/demo-benchmark")
    args = parser.parse_args()
    switches = WITHOUT_AVX512 if args.avx2 else {}
    run_dir = args.run_dir.resolve()
    report = report_of(run_dir, run_demo(run_dir, switches))
    if args.figure is not None:
        shutil.copyfile(run_dir / "plots/scores.png", args.figure)
    print(format_table(("phase", "median s"), list(report["step_seconds"].items())))
    print(f"{report['seconds'] / 60:.1f} minutes; win rate {report['win_rate']:.3f} {report['win_rate_ci95']}")
    if args.json is not None:
        write_report(args.json, {"machine": describe_machine(), "switches": switches, **report})


if __name__ == "__main__":
    main()
