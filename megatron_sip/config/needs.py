"""Which candidates and servers a run needs, from its flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from megatron_sip.config.flags import Role
from megatron_sip.config.held_out import prompt_sets_of, suites_of
from megatron_sip.judge.settings import ScheduleSettings, asks_server, split_criterion
from megatron_sip.records import CANDIDATE_KINDS, CandidateKind

DEFAULT_CRITERIA = {
    "documents": ["likelihood=1"],
    "judgements": ["label=1"],
    "rewrites": ["copy=1", "rewrite=1"],
    "thoughts": ["similarity=1"],
}
"""By --tasks."""


@dataclass(frozen=True, slots=True)
class Needs:
    """kinds: candidates to make, in canonical order. scores: selection needs them: not for SFT, nor for fixed roles.

    served: a criterion asks a judge's servers. replays: groups are read, not made. compares: the policy is compared with the
    initial one, at the end or on the way. measures: the policy is measured on the way. rates: its answers to sets of prompts
    are rated then. own_rewriter, own_eval_judge: these have servers of their own, running or to be started; otherwise both are
    the teacher's work.
    """

    kinds: tuple[CandidateKind, ...]
    scores: bool
    served: bool
    replays: bool
    compares: bool
    measures: bool
    rates: bool
    own_rewriter: bool
    own_eval_judge: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Needs:
        """What the flags ask for."""
        target = "suffix" if args.sft_target == "document" else args.sft_target
        wanted = {target} if args.objective == "sft" else set(args.dpo_pair or candidates_of(args))
        return cls(
            kinds=cast("tuple[CandidateKind, ...]", tuple(kind for kind in CANDIDATE_KINDS if kind in wanted)),
            scores=args.objective != "sft" and args.dpo_pair is None,
            served=has_served_criteria(args),
            replays=args.replay_groups is not None,
            compares=args.win_rate_prompts > 0 or "win-rate" in suites_of(args),
            measures=bool(suites_of(args) or prompt_sets_of(args)),
            rates=bool(prompt_sets_of(args)),
            own_rewriter=has_servers(args, "rewriter"),
            own_eval_judge=has_servers(args, "eval_judge"),
        )

    @property
    def judges(self) -> bool:
        """Whether a step's candidates are scored."""
        return self.scores and not self.replays

    @property
    def samples(self) -> bool:
        """Whether a step has rollouts."""
        return "rollout" in self.kinds and not self.replays

    @property
    def judge(self) -> bool:
        """Whether anything is scored in this run, the held-out comparison included, unless that has a judge of its own."""
        return self.judges or (self.compares and not self.own_eval_judge)

    @property
    def eval_judge(self) -> bool:
        """Whether the held-out comparison has a judge of its own."""
        return self.compares and self.own_eval_judge

    @property
    def rewriter(self) -> bool:
        """Whether suffixes are rewritten."""
        return not self.replays and "rewrite" in self.kinds

    @property
    def rewriter_role(self) -> Role:
        """Whose servers rewrite."""
        return "rewriter" if self.own_rewriter else "teacher"

    @property
    def rater_role(self) -> Role:
        """Whose servers rate."""
        return "eval_judge" if self.own_eval_judge else "teacher"

    @property
    def teacher(self) -> bool:
        """Whether the teacher is asked anything."""
        rewrites, rates = self.rewriter and not self.own_rewriter, self.rates and not self.own_eval_judge
        return (self.judge and self.served) or rewrites or rates

    @property
    def engines(self) -> bool:
        """Whether the policy is sampled or measured."""
        return self.samples or self.compares or self.measures


def criteria_of(args: argparse.Namespace) -> list[str]:
    """--criteria, or what it is for these tasks unless given."""
    return args.criteria or DEFAULT_CRITERIA[args.tasks]


def has_served_criteria(args: argparse.Namespace) -> bool:
    """Whether one of the criteria asks a judge's servers."""
    return any(asks_server(split_criterion(item)[0]) for item in criteria_of(args))


def candidates_of(args: argparse.Namespace) -> list[CandidateKind]:
    """--candidates, or what it is for these tasks unless given."""
    return args.candidates or (["suffix", "rollout"] if args.tasks == "documents" else ["rollout"])


def has_servers(args: argparse.Namespace, role: Role) -> bool:
    """Whether the flags name servers for `role` itself, running or to be started."""
    return bool(getattr(args, f"{role}_url", None) or getattr(args, f"{role}_model", None))


def candidate_count(kinds: Sequence[CandidateKind], rollouts: int) -> int:
    """Candidates of one prompt."""
    return sum(rollouts if kind == "rollout" else 1 for kind in kinds)


def contender_count(kinds: Sequence[CandidateKind], rollouts: int, schedule: ScheduleSettings) -> int:
    """Judged candidates of one prompt that compete: all but a rollout drawn as the judge's pivot."""
    drawn = schedule.pivot_apart and schedule.pivot == "rollout" and rollouts > 0
    return candidate_count(kinds, rollouts) - int(drawn)


def branch_count(objective: str, rollouts: int) -> int:
    """The most branches of one example."""
    return {"dpo": 2, "grpo": rollouts}.get(objective, 1)


def branches_in_a_row(objective: str, rollouts: int, most: int | None) -> int:
    """The most of them that stand in one row, where more than `most` are split."""
    count = branch_count(objective, rollouts)
    return count if most is None else min(count, most)
