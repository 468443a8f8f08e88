"""What a run measures on held-out data: its policy against the initial one, and answers to labelled records."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_sip.rollout.sampling import SamplingSettings

Suite = Literal["nll", "diversity", "win-rate"]
SUITES: tuple[Suite, ...] = get_args(Suite)
RATED_SETS = ("realtoxicityprompts", "toxigen", "xstest-safe", "xstest-unsafe", "redpajama")
"""Sets of prompts whose continuations are rated for safety."""
EVAL_RECORDS = 256
"""Unless --eval-records says otherwise."""
DEFAULT_SUITES: tuple[Suite, ...] = ("nll", "diversity")


@dataclass(frozen=True, slots=True)
class HeldOutSettings:
    """prompts: of the comparison with the initial policy, 0: none is made."""

    prompts: int
    sampling: SamplingSettings


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """On how many held-out records or prefixes a run is measured, before the first step and every `interval` steps; 0: never.

    suites: of documents, what is measured. prompt_sets: files of prompts by the names of their sets, whose continuations are
    rated for safety. sampling: of continuations.
    """

    interval: int
    records: int
    suites: tuple[Suite, ...]
    prompt_sets: Mapping[str, Path]
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
    suites, sets = suites_of(args), prompt_sets_of(args)
    return ValidationSettings(args.eval_interval or 0, args.eval_records, suites, sets, held_out_sampling(args))


def suites_of(args: argparse.Namespace) -> tuple[Suite, ...]:
    """--eval-suites but for the sets, or what it is unless given; none of labelled tasks, whose own answers are measured."""
    if args.eval_interval is None or args.tasks != "documents":
        return ()
    given = args.eval_suites or DEFAULT_SUITES
    return tuple(name for name in SUITES if name in given)


def prompt_sets_of(args: argparse.Namespace) -> dict[str, Path]:
    """The sets of prompts among --eval-suites."""
    if args.eval_interval is None or args.tasks != "documents":
        return {}
    pairs = (item.partition("=") for item in args.eval_suites or () if "=" in item)
    return {name: Path(file) for name, _, file in pairs}
