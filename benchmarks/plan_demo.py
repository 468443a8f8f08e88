"""Two short runs of the demo that differ in lengths, rollouts and batch: what the planner foresees of one from the other.

    python benchmarks/plan_demo.py [--json FILE] [--run-dir DIR]

tests/unit/planning/test_plan.py holds the foreseen steps against the measured ones. Old runs in --run-dir are not continued.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import describe_machine, write_report

REPO = Path(__file__).resolve().parents[1]
RUNS = {
    "small": ["--seq-length", "192", "--suffix-length", "24", "--num-rollouts", "2", "--global-batch-size", "4"],
    "demo": [],
}
SHORT = ["--train-iters", "5", "--lr-warmup-iters", "1", "--win-rate-prompts", "0", "--save-interval", "100"]


def run(run_dir: Path, flags: list[str]) -> dict[str, Any]:
    """One run's flags and seconds by phase of each step. Raises CalledProcessError."""
    shutil.rmtree(run_dir, ignore_errors=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["examples/demo.sh", "--run-dir", str(run_dir), "--", *SHORT, *flags]
    subprocess.run(command, cwd=REPO, env=environment, check=True)
    return recorded(run_dir, flags)


def recorded(run_dir: Path, flags: list[str]) -> dict[str, Any]:
    """What a run folder says of its steps."""
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    wanted = [{name: step[name] for name in step if name.startswith(("step", "seconds/"))} for step in steps]
    return {"flags": flags, "steps": [{name: round(value, 3) for name, value in step.items()} for step in wanted]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--run-dir", type=Path, default=REPO / "build/plan-benchmark")
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    runs = {name: run(args.run_dir.resolve() / name, flags) for name, flags in RUNS.items()}
    if args.json is not None:
        write_report(args.json, {"machine": describe_machine(), "load_average_before": load, "runs": runs})


if __name__ == "__main__":
    main()
