"""Ports of a test's own."""

from __future__ import annotations

import socket

from megatron_sip.serving.launch import reserve_port

KEPT: list[socket.socket] = []


def kept_port() -> int:
    """At which nobody listens but who is told of it, for as long as this process lives."""
    KEPT.append(reserve_port())
    return int(KEPT[-1].getsockname()[1])
