"""How long requests wait for servers that may be slow, and may be gone: by their progress, with an upper bound.

Requests that are ready together wait for each other at servers that are busy. As long as any is answered the others will be; so
what ends them is a silence, and not the time that all of them take.
"""

from __future__ import annotations

import math

LONGEST_WAIT = 8
"""Silences after which a request ends, whatever is answered meanwhile: it must not wait for ever."""


def longest_wait(ready_at: float, silence_s: float) -> float:
    """The deadline of a request that was ready to be sent at `ready_at`, in the same clock."""
    return ready_at + LONGEST_WAIT * silence_s


def waits_until(deadline: float, silence_s: float, answered_at: float) -> float:
    """When a request ends that has the deadline of `longest_wait`, if none is answered after `answered_at`.

    That is a silence after the last answer to any request, or after it was ready itself. Any other deadline with a silence of
    infinity is just that deadline.
    """
    if silence_s == math.inf:
        return deadline
    return min(deadline, max(deadline - LONGEST_WAIT * silence_s, answered_at) + silence_s)
