"""Ports at which nobody listens."""

from __future__ import annotations

from megatron_sip.serving.launch import reserve_port


def free_port() -> int:
    """Free now: for something that listens at once, or for nobody."""
    with reserve_port() as reserved:
        return int(reserved.getsockname()[1])
