"""What a run measures on held-out data: its policy against the initial one, and answers to labelled records."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_sip.rollout.sampling import SamplingSettings

Suite = Literal["nll", "diversity", "win-rate"]
SUITES: tuple[Suite, ...] = get_args(Suite)
DEFAULT_SUITES: tuple[Suite, ...] = ("nll", "diversity")


@dataclass(frozen=True, slots=True)
class HeldOutSettings:
    """prompts: of the comparison with the initial policy, 0: none is made."""

    prompts: int
    sampling: SamplingSettings


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """On how many held-out records or prefixes a run is measured, before the first step and every `interval` steps; 0: never.

    suites: of documents, what is measured. sampling: of the continuations that some of them are about.
    """

    interval: int
    records: int
    suites: tuple[Suite, ...]
    sampling: SamplingSettings

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the weights of `step`, 0 being the initial ones, are to be measured in a run of `steps`."""
        return self.interval > 0 and (step % self.interval == 0 or step == steps)


def held_out_settings(args: argparse.Namespace) -> HeldOutSettings:
    """The comparison with the initial policy. Raises ValueError."""
    return HeldOutSettings(args.win_rate_prompts, held_out_sampling(args))


def held_out_sampling(args: argparse.Namespace) -> SamplingSettings:
    """How the compared continuations are sampled. Raises ValueError."""
    return SamplingSettings(args.suffix_length, args.win_rate_temperature, args.rollout_top_p)


def validation_settings(args: argparse.Namespace) -> ValidationSettings:
    """The measurements in the course of a run. Raises ValueError."""
    return ValidationSettings(args.eval_interval or 0, args.eval_records, suites_of(args), held_out_sampling(args))


def suites_of(args: argparse.Namespace) -> tuple[Suite, ...]:
    """--eval-suites, or what it is unless given; none of labelled tasks, which are measured by their own answers."""
    if args.eval_interval is None or args.tasks != "documents":
        return ()
    return tuple(dict.fromkeys(args.eval_suites or DEFAULT_SUITES))
