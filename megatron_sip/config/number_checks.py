"""Numbers that no part of the program has a use for, found before any part is built."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

LEAST = {
    "win_rate_prompts": 0,
    "ref_update_interval": 0,
    "rollout_start_step": 0,
    "rollout_local": 0,
    "local_engine_tokens": 1,
    "weight_sync_bucket_mb": 1,
    "rewrite_temperature": 0,
}
"""Of flags whose settings check nothing themselves, by their names among the arguments."""


def check_numbers(args: argparse.Namespace) -> Iterator[str]:
    """A number of no meaning: below the least one, or none at all."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            yield f"{_flag(name)} {value}: must be at least {least}"
    if args.rollout_timeout <= 0:
        yield f"--rollout-timeout {args.rollout_timeout:g}: seconds are needed, more than 0"
    for name, value in vars(args).items():
        if isinstance(value, float) and math.isnan(value):
            yield f"{_flag(name)} {value}: a number is needed"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
