"""Judges and rewriter: what scores candidates, and what makes one of them."""

from megatron_sip.judge.judge import Judge
from megatron_sip.judge.rewriter import Rewriter, RewriterSettings
from megatron_sip.judge.settings import (
    ClientSettings,
    Endpoint,
    JudgeSettings,
    ScheduleSettings,
    SettingsError,
    known_criteria,
    parse_criteria,
)

__all__ = [
    "ClientSettings",
    "Endpoint",
    "Judge",
    "JudgeSettings",
    "Rewriter",
    "RewriterSettings",
    "ScheduleSettings",
    "SettingsError",
    "known_criteria",
    "parse_criteria",
]
