"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Column = Mapping[str, Any]


def describe(report: Mapping[str, Any]) -> str:
    """The text of a report of `megatron_sip.plan`, whose best split and the given one stand side by side."""
    columns = {name: report[name] for name in ("best", "given") if name in report}
    lines = ["A step asks for", *(f"  {name:<32}{count:>16,}" for name, count in report["counts of a step"].items())]
    lines += ["", f"{report['gpu']:<34}" + "".join(f"{name:>16}" for name in columns)]
    for name, show in _rows(report, columns["best"]):
        lines.append(f"  {name:<32}" + "".join(f"{show(column):>16}" for column in columns.values()))
    return "\n".join(lines)


def _rows(report: Mapping[str, Any], first: Column) -> list[tuple[str, Callable[[Column], str]]]:
    """(its name, what it shows of a column) of each row."""
    memory, steps, order = "memory of a trainer rank", report["steps"], report["order"]
    return [
        *((f"GPUs: {role}", lambda c, r=role: f"{c['gpus'].get(r, 0)}") for role in first["gpus"]),
        ("trainer: tensor x pipe x data", lambda c: _sizes(c["trainer"])),
        *(
            (f"{role}: {name}", lambda c, r=role, n=name: f"{c['servers'][r][n]:,.0f}")
            for role, figures in first["servers"].items()
            for name in figures
        ),
        *((f"GB a rank: {part}", lambda c, p=part: f"{c[memory][p] / 1e9:.1f}") for part in first[memory]),
        ("GB a rank: all", lambda c: f"{sum(c[memory].values()) / 1e9:.1f}"),
        *((f"seconds: {phase}", lambda c, p=phase: f"{c['seconds'].get(p, 0):.2f}") for phase in first["seconds"]),
        *((f"a step, {name}", lambda c, n=name: f"{c['step'][n]:.1f} s") for name in first["step"]),
        *((f"idle, {order}: {role}", lambda c, r=role: f"{c['idle'].get(r, 0):.0%}") for role in first["idle"]),
        *((f"{steps:,} steps, {name}", lambda c, n=name: _days(c["days"][n])) for name in first["days"]),
    ]


def _sizes(trainer: Mapping[str, int]) -> str:
    return " x ".join(str(trainer[name]) for name in ("tensor", "pipeline", "data"))


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
