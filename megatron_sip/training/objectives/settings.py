"""Which objective is trained, with its constants. Needs no torch: flags are checked with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Objective = Literal["sft", "rf-nll", "dpo", "grpo"]
DpoLoss = Literal["sigmoid", "ipo"]
GrpoLength = Literal["token", "sequence", "constant"]
MismatchCorrection = Literal["none", "truncate", "mask"]


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """Which objective, and its constants.

    beta: strength of the pull to the reference in DPO and IPO (Rafailov et al. 2023, equation 7).
    label_smoothing: probability that a pair's order is wrong (conservative DPO), only with dpo_loss sigmoid.
    nll_coef: weight of the chosen branch's mean token NLL beside DPO (Pang et al. 2024).
    clip_low, clip_high: GRPO keeps the probability ratio in [1 - clip_low, 1 + clip_high].
    kl_coef: weight of GRPO's KL penalty.
    grpo_length: what GRPO divides a branch's sum of token losses by. token: nothing, the mean is over all tokens of the step
        (DAPO, Yu et al. 2025, equation 8); sequence: its length, then the mean over branches (Shao et al. 2024, equation 3);
        constant: grpo_constant tokens, likewise (Dr. GRPO, Liu et al. 2025).
    mismatch_correction: see `mismatch.correction`.

    Raises:
        ValueError: a constant out of its range.
    """

    objective: Objective
    beta: float = 0.1
    nll_coef: float = 0.0
    label_smoothing: float = 0.0
    dpo_loss: DpoLoss = "sigmoid"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    grpo_length: GrpoLength = "token"
    grpo_constant: int = 128
    mismatch_correction: MismatchCorrection = "truncate"

    def __post_init__(self) -> None:
        _require(
            self.objective in ("sft", "rf-nll", "dpo", "grpo"), "--objective", self.objective, "sft, rf-nll, dpo, grpo"
        )
        _require(self.dpo_loss in ("sigmoid", "ipo"), "--dpo-loss", self.dpo_loss, "sigmoid or ipo")
        _require(
            self.grpo_length in get_args(GrpoLength), "--grpo-length", self.grpo_length, "token, sequence or constant"
        )
        _require(
            self.mismatch_correction in get_args(MismatchCorrection),
            "--mismatch-correction",
            self.mismatch_correction,
            "none, truncate or mask",
        )
        _require(math.isfinite(self.beta) and self.beta > 0, "--dpo-beta", self.beta, "a positive number")
        _require(0 <= self.label_smoothing < 0.5, "--dpo-label-smoothing", self.label_smoothing, "in [0, 0.5)")
        _require(
            self.dpo_loss == "sigmoid" or self.label_smoothing == 0,
            "--dpo-label-smoothing",
            self.label_smoothing,
            "0 with ipo",
        )
        _require(
            self.grpo_constant > 0 or self.grpo_length != "constant", "grpo_constant", self.grpo_constant, "above 0"
        )
        _require(self.clip_low < 1, "--grpo-clip-low", self.clip_low, "below 1")
        for name, value in (
            ("--dpo-nll-coef", self.nll_coef),
            ("--grpo-clip-low", self.clip_low),
            ("--grpo-clip-high", self.clip_high),
            ("--grpo-kl-coef", self.kl_coef),
        ):
            _require(math.isfinite(value) and value >= 0, name, value, "a number not below 0")

    @property
    def needs_reference(self) -> bool:
        """Does the loss need the reference model's log-probs?"""
        return self.objective == "dpo" or (self.objective == "grpo" and self.kl_coef > 0)


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, must be {right}")
