"""Which objective is trained, with its constants. Needs no torch: flags are checked with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Objective = Literal["sft", "rf-nll", "dpo", "grpo"]
DpoLoss = Literal["sigmoid", "ipo"]
GrpoAverage = Literal["sequence", "token"]


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """Which objective, and its constants.

    beta: strength of the pull to the reference in DPO and IPO (Rafailov et al. 2023, equation 7).
    label_smoothing: probability that a pair's order is wrong (conservative DPO), only with dpo_loss sigmoid.
    nll_coef: weight of the chosen branch's mean token NLL beside DPO (Pang et al. 2024).
    clip_low, clip_high: GRPO keeps the probability ratio in [1 - clip_low, 1 + clip_high].
    kl_coef: weight of GRPO's KL penalty.
    grpo_average: mean over the tokens of each branch, then over branches (Shao et al. 2024, equation 3),
        or over all tokens.

    Raises:
        ValueError: a constant out of its range.
    """

    objective: Objective
    beta: float = 0.1
    nll_coef: float = 0.0
    label_smoothing: float = 0.0
    dpo_loss: DpoLoss = "sigmoid"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    grpo_average: GrpoAverage = "sequence"

    def __post_init__(self) -> None:
        _require(
            self.objective in ("sft", "rf-nll", "dpo", "grpo"), "--objective", self.objective, "sft, rf-nll, dpo, grpo"
        )
        _require(self.dpo_loss in ("sigmoid", "ipo"), "--dpo-loss", self.dpo_loss, "sigmoid or ipo")
        _require(self.grpo_average in ("sequence", "token"), "grpo_average", self.grpo_average, "sequence or token")
        _require(math.isfinite(self.beta) and self.beta > 0, "--dpo-beta", self.beta, "a positive number")
        _require(0 <= self.label_smoothing < 0.5, "--dpo-label-smoothing", self.label_smoothing, "in [0, 0.5)")
        _require(
            self.dpo_loss == "sigmoid" or self.label_smoothing == 0,
            "--dpo-label-smoothing",
            self.label_smoothing,
            "0 with ipo",
        )
        constants = (("clip_low", self.clip_low), ("clip_high", self.clip_high), ("kl_coef", self.kl_coef))
        for name, value in (("--dpo-nll-coef", self.nll_coef), *constants):
            _require(math.isfinite(value) and value >= 0, name, value, "a number not below 0")

    @property
    def needs_reference(self) -> bool:
        """Does the loss need the reference model's log-probs?"""
        return self.objective == "dpo" or (self.objective == "grpo" and self.kl_coef > 0)


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, must be {right}")
