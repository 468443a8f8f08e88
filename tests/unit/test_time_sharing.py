"""Whose turn it is with the GPUs that trainer and engines share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_sip.platform.megatron import prepare_megatron

LENDS = ["silent True", "release", "barrier"]
TAKES = ["barrier", "resume", "silent False", "barrier"]


def events(*, started_them: bool) -> list[str]:
    """What a rank does in a step."""
    prepare_megatron()  # before anything imports Megatron
    from megatron_sip.time_sharing import TimeSharing

    done: list[str] = []
    exchange: Any = SimpleNamespace(barrier=lambda: done.append("barrier"))
    engines: Any = SimpleNamespace(release=lambda: done.append("release"), resume=lambda: done.append("resume"))
    servers: Any = SimpleNamespace(expect_silent_engines=lambda silent: done.append(f"silent {silent}"))
    sharing = TimeSharing(exchange, engines, servers if started_them else None)
    sharing.to_trainer()
    sharing.to_engines()
    return done


def test_no_rank_trains_before_the_engines_lent_their_memory_nor_has_it_when_they_take_it() -> None:
    assert events(started_them=True) == [*LENDS, *TAKES]
    assert events(started_them=False) == ["barrier", "barrier", "barrier"]
