"""One server as a pool knows it: where it is, how it is asked, how it fares; and how patient a pool is with its failures."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.proxy import DIRECT, Proxy

PROBING_S = 0.05
"""After which a server is looked at again while a probe of it is under way."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts a request gets, and the back-off between them: uniform in 0 .. min(longest_s, first_s * 2^k).

    A refused connection is no attempt: the request waits for a server until its deadline.
    breaker: after `breaker_failures` in a row a server is left alone for breaker_first_s, at each further failure for twice as
    long, up to breaker_longest_s.
    longest_retry_after_s: a server that asks for more is asked again after this time.
    """

    attempts: int = 5
    first_s: float = 0.2
    longest_s: float = 10.0
    breaker_failures: int = 5
    breaker_first_s: float = 0.5
    breaker_longest_s: float = 15.0
    longest_retry_after_s: float = 3600.0


@dataclass(slots=True)
class TokenBucket:
    """Lets `rate` requests per second through, at most one second's worth at once. rate 0: no limit."""

    rate: float
    _level: float = field(init=False, default=0.0)
    _filled_at: float = field(init=False, default=0.0)

    def wait_s(self, now: float) -> float:
        """Take one token and return 0, or return how long to wait before asking again."""
        if self.rate <= 0:
            return 0.0
        capacity = max(1.0, self.rate)
        filled = (now - self._filled_at) * self.rate if self._filled_at else capacity
        self._level = min(capacity, self._level + filled)
        self._filled_at = now
        if self._level >= 1.0:
            self._level -= 1.0
            return 0.0
        return (1.0 - self._level) / self.rate


@dataclass(slots=True)
class Server:
    """One server and what is known about its health.

    key: sent as a bearer token; no message shows it.
    in_flight, calls, seconds: requests sent to it that have not ended, all that were, and the time that these took.
    refuses: whether it last took no connection.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    proxy: Proxy = DIRECT
    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(0.0))
    in_flight: int = field(init=False, default=0)
    calls: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)
    failures_in_a_row: int = field(init=False, default=0)
    openings: int = field(init=False, default=0)
    open_until: float = field(init=False, default=0.0)
    closed_until: float = field(init=False, default=0.0)
    probing: bool = field(init=False, default=False)
    refuses: bool = field(init=False, default=False)
    stale: str = field(init=False, default="")
    """What was said when it failed for having other weights than were asked for, which waiting does not change."""
    check: asyncio.Task[None] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        if not self.url.startswith("https:"):  # else the proxy only sees the request for a tunnel
            headers |= self.proxy.headers
        return headers

    def available_in(self, now: float) -> float:
        """Seconds until the breaker lets a request through (0: now); while a probe is under way a short while."""
        closed = max(0.0, self.closed_until - now)
        if self.open_until == 0.0 or closed:
            return closed
        if self.probing:
            return PROBING_S
        return max(0.0, self.open_until - now)

    def close_until(self, time: float) -> None:
        """Send nothing before `time`, as the server asked, and then a single request first."""
        self.closed_until = max(self.closed_until, time)
        self.open_until = max(self.open_until, time)

    def turned(self, refuses: bool) -> bool:
        """Note whether it refuses connections; True when it did not before, or did: it ended, or was started again."""
        changed, self.refuses = self.refuses != refuses, refuses
        return changed

    def succeeded(self) -> None:
        self.failures_in_a_row, self.openings, self.open_until = 0, 0, 0.0
        self.probing, self.stale = False, ""

    def failed(self, now: float, policy: RetryPolicy, error: RequestError) -> bool:
        """Note a failure; True when it opened the breaker (again)."""
        self.failures_in_a_row += 1
        self.probing, self.stale = False, error.detail if error.kind == "stale-weights" else ""
        if self.failures_in_a_row < policy.breaker_failures or now < self.open_until:
            return False  # requests that were under way when it opened say nothing new
        self.open_until = now + min(policy.breaker_longest_s, policy.breaker_first_s * 2 ** min(self.openings, 30))
        self.openings += 1
        return True
