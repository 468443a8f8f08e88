"""A step's experience that was made while the step before it trained, as that step's checkpoint keeps it.

The weights that its rollouts are of are gone once that step is over: after a kill nobody could make it again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import zstandard

from megatron_sip.experience.rounds import StepExperience, is_representative, lost_groups
from megatron_sip.experience.selection import SelectionSettings
from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import Branch, Example

PHASES = ("rollout", "judge", "judging")
"""Of a step's seconds, those that pass while the step before it trains."""


def made_ahead(made: StepExperience) -> StepExperience:
    """With the seconds of its phases as seconds/ahead/PHASE: they are none of the step that trains on it."""
    ahead = {f"seconds/{phase}": f"seconds/ahead/{phase}" for phase in PHASES}
    return replace(made, metrics={ahead.get(name, name): value for name, value in made.metrics.items()})


def is_worth_keeping(made: StepExperience, least: float) -> bool:
    """Whether a run that goes on should train on it: not where an outage took most of it, whose tasks are to be tried again.

    least: share of the groups that must be whole, as of `is_representative`.
    """
    return is_representative(made.metrics, least) and (bool(made.examples) or not lost_groups(made.metrics))


def made_for(selection: SelectionSettings, prompts: int, oversample: int) -> str:
    """Equal for runs, and versions of this program, whose trainer can take each other's examples."""
    kept = [[field.name for field in fields(record)] for record in (Example, Branch)]
    return json.dumps([asdict(selection), prompts, oversample, kept])


def pack(made: StepExperience, purpose: str) -> bytes:
    """As `unpack` reads it. purpose: what it is `made_for`."""
    content = {
        "made_for": purpose,
        "rounds": made.rounds,
        "examples": [asdict(example) for example in made.examples],
        "metrics": {
            name: [value.total, value.weight] if isinstance(value, Mean) else value
            for name, value in made.metrics.items()
        },
    }
    return zstandard.compress(json.dumps(content).encode())


def unpack(content: bytes, purpose: str) -> StepExperience | None:
    """An experience equal to the one that was packed; None where it was made for something else."""
    kept = json.loads(zstandard.decompress(content))
    if kept["made_for"] != purpose:
        return None
    metrics: Metrics = {
        name: Mean(*value) if isinstance(value, list) else value for name, value in kept["metrics"].items()
    }
    return StepExperience([_example(record) for record in kept["examples"]], metrics, kept["rounds"], [])


def _example(record: dict[str, Any]) -> Example:
    return Example(**record | {"branches": [Branch(**branch) for branch in record["branches"]]})
