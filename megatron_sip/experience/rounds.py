"""One step's experience of all leaders, over one round of tasks or more. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.experience.maker import Experience
from megatron_sip.experience.selection import NON_FINITE, UNSCORED
from megatron_sip.metrics import Metrics, merge
from megatron_sip.records import Example

LOST = ("rollout ", "judge-", UNSCORED, NON_FINITE)
"""How the reasons begin of groups that engines or judge did not answer for; all others are of whole groups, by selection."""
FAILED_REWRITES = "rewriter/dropped/failed"
"""The metric of rewrites that the rewriter did not answer for; one that it refused is an answer."""


@dataclass(frozen=True, slots=True)
class StepExperience:
    """What a step trains on, of how many rounds of tasks; `unrecorded` says why groups could not be kept, if so."""

    examples: list[Example]
    metrics: Metrics
    rounds: int
    unrecorded: list[str]


def is_enough(rounds: Sequence[Sequence[Experience]], prompts: int, most: int) -> bool:
    """Whether a step has an example for each of `prompts` tasks, or has asked for `most` rounds of them."""
    return len(rounds) >= most or sum(len(part.examples) for shared in rounds for part in shared) >= prompts


def lost_groups(metrics: Metrics) -> dict[str, float]:
    """A step's groups that did not come back whole and judged, by reason: not those of which selection has no use.

    Rewrites that failed, where they are more than all others: a group may be lost in both ways.
    """
    dropped = {name.removeprefix("dropped/"): value for name, value in metrics.items() if name.startswith("dropped/")}
    lost = {why: n for why, n in dropped.items() if why.startswith(LOST) and isinstance(n, float) and n}
    failed = metrics.get(FAILED_REWRITES, 0.0)
    return {"rewrite failed": failed} if isinstance(failed, float) and failed > sum(lost.values()) else lost


def is_representative(metrics: Metrics, least: float) -> bool:
    """Whether at least the share `least` of a step's groups came back whole and judged."""
    groups = metrics.get("groups", 0.0)
    return not isinstance(groups, float) or sum(lost_groups(metrics).values()) <= (1 - least) * groups


def step_experience(rounds: Sequence[Sequence[Experience]], prompts: int, most: int) -> StepExperience:
    """`rounds` of all leaders' parts together, in order; what is beyond a batch of `prompts` examples is counted.

    Metrics add up; durations are those of the slowest leader, of one round after the other. Where more than one round may be
    asked for, grpo/rounds says how many were, and grpo/surplus how many usable groups found no room.
    """
    examples = [example for shared in rounds for part in shared for example in part.examples]
    by_round = [merge(part.metrics for part in shared) for shared in rounds]
    metrics = merge(by_round)
    for name in metrics:
        if name.startswith("seconds/"):
            metrics[name] = sum(seconds for own in by_round if isinstance(seconds := own.get(name, 0.0), float))
    if most > 1:
        metrics |= {"grpo/rounds": float(len(rounds)), "grpo/surplus": float(max(0, len(examples) - prompts))}
        examples = examples[:prompts]
    unrecorded = [part.unrecorded for shared in rounds for part in shared if part.unrecorded is not None]
    return StepExperience(examples, metrics, len(rounds), unrecorded)
