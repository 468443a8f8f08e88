"""HTTP requests to several interchangeable servers: bounded, rate-limited, retried, timed out, counted.

    pool = HttpPool([Server(url) for url in urls], concurrency=256)
    async with pool:
        result = await pool.send(Request(affinity, path, body, parse), deadline=loop.time() + 60)

A request goes to the server that its affinity selects (all requests of one prompt to one server, whose prefix cache
then has it), to another one when that fails. A server that fails repeatedly is left alone for a while (circuit
breaker) and then probed by one request. A refused connection costs no attempt: requests wait for the server to come
back, up to their deadline. Every failure ends in RequestError with a kind to count, never in a result.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import aiohttp
import orjson

from megatron_sip.latency import LatencyHistogram

RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})


class BadResponseError(Exception):
    """A response with status 200 that is not what was asked for; the request is tried again."""


class RequestError(Exception):
    """A request that got no usable response. `kind` is short and meant for counting."""

    def __init__(self, kind: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts a request gets, and the back-off between them: uniform in 0 .. min(longest_s, first_s * 2^k)."""

    attempts: int = 5
    first_s: float = 0.2
    longest_s: float = 10.0
    breaker_failures: int = 5
    breaker_first_s: float = 0.5
    breaker_longest_s: float = 15.0


@dataclass(slots=True)
class TokenBucket:
    """Lets `rate` requests a second through, at most one second's worth at once. rate 0: no limit."""

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
    """One server and what is known about its health. `tag` is the caller's own record of it."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    requests_per_s: float = 0.0
    tag: Any = None
    bucket: TokenBucket = field(init=False)
    failures_in_a_row: int = field(init=False, default=0)
    openings: int = field(init=False, default=0)
    open_until: float = field(init=False, default=0.0)
    probing: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.bucket = TokenBucket(self.requests_per_s)

    def available_in(self, now: float) -> float:
        """Seconds until the breaker lets a request through (0: now); while a probe is under way a short while."""
        if self.open_until == 0.0:
            return 0.0
        if self.probing:
            return 0.05
        return max(0.0, self.open_until - now)

    def succeeded(self) -> None:
        self.failures_in_a_row, self.openings, self.open_until, self.probing = 0, 0, 0.0, False

    def failed(self, now: float, policy: RetryPolicy) -> bool:
        """Note a failure; True when it opened the breaker (again)."""
        self.failures_in_a_row += 1
        self.probing = False
        if self.failures_in_a_row < policy.breaker_failures or now < self.open_until:
            return False  # requests that were under way when it opened say nothing new
        self.open_until = now + min(policy.breaker_longest_s, policy.breaker_first_s * 2 ** min(self.openings, 30))
        self.openings += 1
        return True


@dataclass(frozen=True, slots=True)
class Request:
    """What to send. The functions get the chosen server: its tag may decide path, body and reading of the response."""

    affinity: int
    path: Callable[[Server], str]
    body: Callable[[Server], bytes]
    parse: Callable[[Server, Any], Any]
    allowed: Callable[[Server], bool] = lambda server: True


class HttpPool:
    """See the module. Use as an async context manager; one per event loop."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        concurrency: int,
        call_timeout_s: float = 120.0,
        policy: RetryPolicy | None = None,
        seed: int = 0,
    ) -> None:
        if not servers:
            raise ValueError("an HttpPool needs at least one server URL")
        self.servers = list(servers)
        self.counts: Counter[str] = Counter()
        self.latency = LatencyHistogram()
        self._policy = policy or RetryPolicy()
        self._call_timeout_s = call_timeout_s
        self._concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._random = random.Random(seed)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=self._concurrency, keepalive_timeout=30)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), cookie_jar=aiohttp.DummyCookieJar()
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(self, request: Request, deadline: float) -> Any:
        """The parsed response. `deadline` in the event loop's time. Raises RequestError."""
        loop = asyncio.get_running_loop()
        candidates = [server for server in self._route(request.affinity) if request.allowed(server)]
        if not candidates:
            raise RequestError("no-server", "no server can answer this kind of request")
        last = RequestError("deadline", "no attempt was possible before the deadline")
        attempts = tries = 0
        while attempts < self._policy.attempts:
            if not await self._wait(server := self._choose(candidates, tries), deadline):
                raise RequestError("deadline", f"last failure: {last}")
            try:
                return await self._attempt(request, server, deadline)
            except RequestError as failure:
                last = failure
                self.counts[f"failed-attempts/{failure.kind}"] += 1
            tries += 1
            attempts += last.kind != "connection"
            if last.kind == "rejected":
                break
            delay = max(self._backoff(tries), last.retry_after_s)
            if attempts >= self._policy.attempts:
                break
            if loop.time() + delay >= deadline:
                raise RequestError("deadline", f"last failure: {last}")
            self.counts["retries"] += 1
            await asyncio.sleep(delay)
        raise last

    async def _attempt(self, request: Request, server: Server, deadline: float) -> Any:
        """One attempt on one server. Raises RequestError with the kind of failure."""
        assert self._session is not None, "HttpPool is used outside its context"
        loop = asyncio.get_running_loop()
        try:
            async with self._slots:
                begin = loop.time()
                limit = min(begin + self._call_timeout_s, deadline)
                async with (
                    asyncio.timeout_at(limit),
                    self._session.post(
                        server.url + request.path(server), data=request.body(server), headers=server.headers
                    ) as response,
                ):
                    status, content = response.status, await response.read()
            if status == 200:
                result = request.parse(server, orjson.loads(content))
                server.succeeded()
                self.counts["requests"] += 1
                self.latency.add(loop.time() - begin)
                return result
            failure = _status_failure(status, content, response.headers.get("Retry-After"))
        except TimeoutError:
            kind = "deadline" if loop.time() >= deadline else "timeout"
            failure = RequestError(kind, f"{server.url} did not answer in time")
        except aiohttp.ClientConnectorError as error:
            failure = RequestError("connection", f"{server.url}: {error}")
        except (aiohttp.ClientError, ConnectionError) as error:
            failure = RequestError("disconnected", f"{server.url}: {error!r}")
        except (BadResponseError, orjson.JSONDecodeError) as error:
            failure = RequestError("bad-response", f"{server.url}: {error}")
        finally:
            server.probing = False
        # Refusing one request says nothing about a server's health; not answering, or answering nonsense, does.
        if failure.kind != "rejected" and server.failed(loop.time(), self._policy):
            self.counts["breaker-opened"] += 1
        raise failure

    async def _wait(self, server: Server, deadline: float) -> bool:
        """Wait for the server's breaker and rate limit; False when the deadline comes first."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            delay = server.available_in(now) or server.bucket.wait_s(now)
            if delay <= 0.0:
                server.probing = server.open_until != 0.0
                return now < deadline
            if now + delay >= deadline:
                return False
            await asyncio.sleep(delay)

    def _choose(self, candidates: Sequence[Server], tries: int) -> Server:
        """The first available server in routing order; each retry starts one further. All unavailable: the soonest."""
        if len(candidates) == 1:
            return candidates[0]
        now = asyncio.get_running_loop().time()
        turn = tries % len(candidates)
        order = [*candidates[turn:], *candidates[:turn]]
        chosen = min(order, key=lambda server: server.available_in(now))
        if chosen is not candidates[0]:
            self.counts["failovers"] += 1
        return chosen

    def _route(self, affinity: int) -> list[Server]:
        """Servers by rendezvous hashing: the order changes little when a server is added or removed."""
        if len(self.servers) == 1:
            return self.servers
        return sorted(self.servers, key=lambda server: _hash(f"{server.url}\x00{affinity}"))

    def _backoff(self, tries: int) -> float:
        longest = min(self._policy.longest_s, self._policy.first_s * 2 ** min(tries - 1, 30))
        return self._random.uniform(0.0, longest)


def _status_failure(status: int, content: bytes, retry_after: str | None) -> RequestError:
    kind = {429: "rate-limited"}.get(status, "server-error") if status in RETRIED_STATUS else "rejected"
    detail = f"status {status}: {content[:300].decode(errors='replace')}"
    return RequestError(kind, detail, _retry_after_s(retry_after))


def _retry_after_s(value: str | None) -> float:
    """Seconds that a Retry-After header asks for (a number or an HTTP date), 0 without or with a broken one."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
