"""How many requests a run has under way: a total, divided among its data-parallel replicas, each of which asks alone."""

from __future__ import annotations

CALLS_A_SERVER = 64
LEAST_CALLS = 256


def calls_in_flight(given: int | None, servers: int) -> int:
    """Of all replicas together at so many servers: as `given`, else CALLS_A_SERVER for each server and LEAST_CALLS at least."""
    return max(LEAST_CALLS, CALLS_A_SERVER * servers) if given is None else given


def share_of_calls(given: int | None, servers: int, replicas: int) -> int:
    """One replica's; it has at least one."""
    return max(1, calls_in_flight(given, servers) // replicas)
