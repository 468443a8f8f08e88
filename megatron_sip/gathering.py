"""What a step trains on, of all leaders, on every rank: made when the step begins, or while the step before it trains.

With --max-staleness 1, at step s, whose weights the engines have:

    take the experience of step s -> begin that of s + 1 -> train -> wait for it -> push the weights of s + 1

So there is never more than one under way, none of it between two steps, and its rollouts are by the weights before the last
update. The first step's, and that of a run that was stopped before it was there, is made when the step begins.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_sip.console import say
from megatron_sip.experience.ahead import made_ahead
from megatron_sip.experience.maker import Experience
from megatron_sip.experience.rounds import (
    StepExperience,
    is_enough,
    is_representative,
    lost_groups,
    step_experience,
)
from megatron_sip.metrics import Metrics
from megatron_sip.stop_signal import StopSignal

if TYPE_CHECKING:
    from megatron_sip.run import Run


@dataclass(frozen=True, slots=True)
class UnderWay:
    """The next step's experience. share: this leader's, of the first round; None on other ranks."""

    share: Future[Experience | None] | None


def take_experience(run: Run, stop: StopSignal) -> StepExperience | None:
    """The present step's experience; without examples where too few of its groups are left. None: a stop was requested."""
    if run.ahead is not None and run.exchange.any_rank(stop.requested):
        return None  # and the checkpoint keeps it
    made, run.ahead = run.ahead, None
    if made is None:
        made = gather_rounds(run, stop, [])
    settings = run.settings.run
    if made is None or is_representative(made.metrics, settings.min_usable_share):
        return made
    if settings.rank == 0:
        lost = ", ".join(f"{why} {count:.0f}" for why, count in lost_groups(made.metrics).items())
        say(
            f"step {run.state.iteration + 1}: no update, since more than {1 - settings.min_usable_share:.0%} of its groups are "
            f"lost ({lost}); --min-usable-share says how many may be"
        )
    return replace(made, examples=[])


def begin_ahead(run: Run, stop: StopSignal, rounds: int) -> UnderWay | None:
    """Begin the next step's experience, behind the present one's `rounds`; None where there is none, or it is made later."""
    settings = run.settings.run
    if not settings.max_staleness or run.state.iteration + 1 >= settings.steps:
        return None
    return UnderWay(run.begin_experience(stop, behind=rounds))


def finish_ahead(run: Run, stop: StopSignal, under_way: UnderWay | None) -> Metrics:
    """Wait for what is now the present step's experience, before the engines get other weights.

    One that a stop cut off, or that could not be recorded, is left to the run that goes on.
    """
    if under_way is None:
        return {}
    shared = run.exchange.all_gather_from_leaders(run.collect(under_way.share))
    made = None if None in shared else gather_rounds(run, stop, [shared])
    if made is not None and made.unrecorded:
        run.troubles += [trouble if run.settings.run.rank == 0 else "" for trouble in made.unrecorded]
    elif made is not None:
        run.ahead = made_ahead(made)
    return {}


def gather_rounds(run: Run, stop: StopSignal, rounds: list[list[Experience]]) -> StepExperience | None:
    """All leaders' experience of the present step, of `rounds` and what else it takes; None when a stop was requested.

    Leaders go on together to a further round of tasks while fewer groups are usable than a step has prompts.
    """
    settings = run.settings.run
    while not is_enough(rounds, settings.prompts, settings.oversample):
        shared = run.exchange.all_gather_from_leaders(run.make_experience(stop, len(rounds)))
        if any(part is None for part in shared):
            return None
        rounds.append(shared)
    return step_experience(rounds, settings.prompts, settings.oversample)
