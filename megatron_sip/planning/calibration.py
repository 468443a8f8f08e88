"""What a run's metrics say of the formulas: a factor for each phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from statistics import median

from megatron_sip.errors import ArgumentError
from megatron_sip.planning.devices import Factors
from megatron_sip.planning.timing import Cluster, Machine, phases
from megatron_sip.planning.work import Work

PHASES = tuple(field.name for field in fields(Factors))


def measured_seconds(steps: Sequence[Mapping[str, float]], shared: bool = False) -> dict[str, float]:
    """Medians of a metrics.jsonl's seconds by phase, `total` too; without the first step, in which much is set up.

    The judge's are those in which any group was being judged, beside rollouts or not, where the run measured them. Experience
    that was made a step ahead took as long as it did. shared: of roles that share their processors, where judging that goes
    on beside rollouts lengthens these; what counts as the judge's is then what comes behind them.

    Raises:
        ArgumentError: there are fewer than two steps.
    """
    later = [step for step in steps if "seconds/total" in step][1:]
    if not later:
        raise ArgumentError("--from-run: metrics.jsonl has fewer than two steps, and the first one sets much up")
    names: dict[str, Sequence[str]] = {name: (name,) for name in (*PHASES, "total")} | {
        "rollout": ("rollout", "ahead/rollout")
    }
    names["judge"] = ("judge", "ahead/judge") if shared else ("judging", "ahead/judging", "judge")
    return {phase: median([_seconds(step, found) for step in later]) for phase, found in names.items()}


def _seconds(step: Mapping[str, float], names: Sequence[str]) -> float:
    found = (step.get(f"seconds/{name}") for name in names)
    return next((seconds for seconds in found if seconds is not None), 0.0)


def factors_of(seconds: Mapping[str, float], work: Work, machine: Machine, cluster: Cluster) -> Factors:
    """Measured `seconds` of a run's phases over those of the formulas for the same work; 1 where either is nothing."""
    foreseen = phases(work, replace(machine, factors=Factors()), cluster)
    found = {}
    for name in PHASES:
        expected, measured = getattr(foreseen, name), seconds.get(name, 0.0)
        found[name] = measured / expected if expected and measured else 1.0
    return Factors(**found)
