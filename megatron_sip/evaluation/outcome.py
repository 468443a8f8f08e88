"""The end of a run: the held-out comparison, summary.json, comparisons.jsonl, plots and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sip.evaluation.held_out import HeldOutOutcome
from megatron_sip.evaluation.report import write_report
from megatron_sip.evaluation.run_record import read_run_record
from megatron_sip.files import write_atomically
from megatron_sip.training.metrics_writer import read_metrics, trained_steps

FINAL_STEPS = 10


def summarize(steps: Sequence[dict[str, float]], held_out: HeldOutOutcome | None) -> dict[str, Any]:
    """What summary.json holds. The final rollout chosen rate, and what it is by chance, are means over the last FINAL_STEPS
    steps."""
    return {
        "steps": trained_steps(steps),
        "seconds": round(sum(step.get("seconds/total", 0.0) for step in steps), 1),
        **held_out_summary(held_out),
        "final_rollout_chosen_rate": final_mean(steps, "chosen_rate/rollout"),
        "final_rollout_chosen_chance": final_mean(steps, "chosen_chance/rollout"),
    }


def held_out_summary(held_out: HeldOutOutcome | None) -> dict[str, Any]:
    """The comparison's part of it; only that there is none, where none was made."""
    if held_out is None:
        return {"win_rate": None}
    win_rate, control = held_out.win_rate, held_out.control
    return {
        "win_rate": win_rate.win_rate,
        "win_rate_ci95": list(win_rate.win_rate_ci95),
        "win_rate_by_criterion": win_rate.by_criterion,
        "prompts": win_rate.prompts,
        "documents": win_rate.documents,
        "prompts_without_verdict": win_rate.failed,
        "mean_scores": list(win_rate.mean_scores),
        "control": None
        if control is None
        else {
            "temperature": control.temperature,
            "win_rate": control.win_rate.win_rate,
            "win_rate_ci95": list(control.win_rate.win_rate_ci95),
        },
        "distinct_3": list(held_out.distinct_3),
        "suffix_nll": list(held_out.suffix_nll),
    }


def final_mean(steps: Sequence[dict[str, float]], name: str) -> float | None:
    """The mean of a metric over those of the last FINAL_STEPS steps that have it."""
    values = [step[name] for step in steps[-FINAL_STEPS:] if name in step]
    return sum(values) / len(values) if values else None


def write_outcome(run_dir: Path, held_out: HeldOutOutcome | None) -> dict[str, Any]:
    """Write everything that stands at the end of a run folder; returns the summary."""
    record = read_run_record(run_dir)
    summary = summarize(read_metrics(run_dir / "metrics.jsonl"), held_out)
    summary["initial_weights"] = record.initial_weights if record is not None else None
    comparisons = () if held_out is None else held_out.comparisons
    lines = (json.dumps(asdict(comparison), ensure_ascii=False) + "\n" for comparison in comparisons)
    write_atomically(run_dir / "comparisons.jsonl", "".join(lines))
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_report(run_dir)
    return summary


def outcome_line(run_dir: Path, summary: Mapping[str, Any]) -> str:
    """What the run came to, and where to read on."""
    report = f"report: {run_dir / 'report.html'}"
    if summary["win_rate"] is None:
        return f"done: {summary['steps']} steps; {report}"
    low, high = summary["win_rate_ci95"]
    control = summary["control"]
    beside = "" if control is None else f"; {control['win_rate']:.1%} for the initial policy at a lower temperature"
    return (
        f"done: {summary['steps']} steps; win rate over the initial policy {summary['win_rate']:.1%} (95% interval {low:.1%} "
        f"to {high:.1%}, {summary['prompts']} held-out prefixes{beside}); {report}"
    )
