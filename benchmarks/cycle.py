"""What a whole cycle came to: how long each stage took, and judge and policy before and after.

    examples/cycle.sh --run-dir runs/cycle
    python benchmarks/cycle.py runs/cycle [--json FILE]

Reads the folder of a cycle that trained its judge, on the machine that ran it: done/, whose files' times are when the stages
ended (of a cycle that was stopped, with its pauses); the judge's validations and its accuracy on held-out records; the policy's
comparison at its end, and what the evaluation measured.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from judge_training import validations
from machine import describe_machine, format_table, write_report

from megatron_sip.evaluation.results import read_results
from megatron_sip.files import read_json
from megatron_sip.training.metrics_writer import read_metrics

MODELS = ("base", "trained")
MEASURES = ("diversity", "nll")


def report_of(run_dir: Path) -> dict[str, Any]:
    """Seconds by stage, the judge's first and last validation and its accuracy, the policy's comparison, its measures."""
    held_out = validations(read_metrics(run_dir / "judge" / "metrics.jsonl"))
    policy = read_json(run_dir / "policy" / "summary.json", "a run's summary")
    return {
        "stage_seconds": stage_seconds(run_dir),
        "judge": {
            "validations": [held_out[0], held_out[-1]],
            "accuracy": read_json(run_dir / "judge" / "accuracy.json", "a judge's accuracy")["all"],
        },
        "policy": {name: value for name, value in policy.items() if name != "initial_weights"},
        "evaluation": {model: measures(run_dir / model) for model in MODELS},
    }


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """By stage, in order, from the end of the one before."""
    ends = sorted((path.stat().st_mtime, path.name) for path in (run_dir / "done").iterdir())
    begun = ((run_dir / "cycle.txt").stat().st_mtime, "")
    return {name: round(end - start, 1) for (start, _), (end, name) in pairwise([begun, *ends])}


def measures(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Of one model, the results of each file."""
    return {name: [asdict(one) for one in read_results(folder / f"{name}.json").results] for name in MEASURES}


def main() -> None:
    """Print the stages and what came of them, and with --json write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="of examples/cycle.sh, done")
    parser.add_argument("--json", type=Path, help="where the report goes")
    given = parser.parse_args()
    report = report_of(given.run_dir)
    print(format_table(["stage", "minutes"], [(name, s / 60) for name, s in report["stage_seconds"].items()]))
    print(f"judge: {report['judge']['accuracy']}\npolicy: {report['policy']}")
    if given.json is not None:
        write_report(given.json, {"machine": describe_machine(), **report})


if __name__ == "__main__":
    main()
