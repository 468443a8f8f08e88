"""HTTP requests to several interchangeable servers: bounded, rate-limited, retried, timed out, counted.

    pool = HttpPool([Server(url) for url in urls], concurrency=256)
    async with pool:
        result = await pool.send(Request(affinity, path, body, parse), deadline=loop.time() + 60)

A request goes to the server that its affinity selects (all requests of one prompt to one server, whose prefix cache
then has it), to another one when that fails. A server that fails repeatedly is left alone for a while (circuit
breaker) and then probed by one request; so is one that names a time in Retry-After. A refused connection and such a
time cost no attempt: the request goes elsewhere, and only when there is no server left waits, up to its deadline.
Every failure ends in RequestError with a kind to count, never in a result.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self

import aiohttp
import orjson

from megatron_sip.serving.http_reply import ReplyTooLongError, masked, masked_reply, plain, printable, read_reply
from megatron_sip.serving.proxy import DIRECT, Proxy

RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})
KEPT_LATENCIES = 4096
REFUSAL_BYTES = 4000
"""Of a refusal, to be read for what the server wants otherwise."""


class BadResponseError(Exception):
    """A response with status 200 that is not what was asked for; the request is tried again."""


class RequestError(Exception):
    """A request that got no usable response. `kind` is short and meant for counting; `refusal` is the text of a 4xx."""

    def __init__(self, kind: str, detail: str, retry_after_s: float = 0.0, refusal: str = "") -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.refusal = refusal


class _ClosedMeanwhileError(Exception):
    """The server was closed while a request waited for its turn."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Attempts a request gets, and the back-off between them: uniform in 0 .. min(longest_s, first_s * 2^k).

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
    """

    url: str
    key: str | None = field(default=None, repr=False)
    requests_per_s: float = 0.0
    proxy: Proxy = DIRECT
    bucket: TokenBucket = field(init=False)
    failures_in_a_row: int = field(init=False, default=0)
    openings: int = field(init=False, default=0)
    open_until: float = field(init=False, default=0.0)
    closed_until: float = field(init=False, default=0.0)
    probing: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.bucket = TokenBucket(self.requests_per_s)

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
            return 0.05
        return max(0.0, self.open_until - now)

    def close_until(self, time: float) -> None:
        """Send nothing before `time`, as the server asked, and then a single request first."""
        self.closed_until = max(self.closed_until, time)
        self.open_until = max(self.open_until, time)

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
    """What to send: `body` may depend on the chosen server. `parse` gets the JSON value of the response."""

    affinity: int
    path: str
    body: Callable[[Server], bytes]
    parse: Callable[[Any], Any]


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
        self.latencies: deque[float] = deque(maxlen=KEPT_LATENCIES)
        """Seconds that the last requests took."""
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
        candidates = self._route(request.affinity)
        last = RequestError("deadline", "no attempt was possible before the deadline")
        attempts = tries = 0
        while True:
            server, probes = await self._acquire(candidates, tries, deadline, last)
            try:
                return await self._attempt(request, server, deadline, probes)
            except _ClosedMeanwhileError:
                continue
            except RequestError as failure:
                last = failure
                self.counts[f"failed-attempts/{failure.kind}"] += 1
            tries += 1
            attempts += last.kind != "connection" and not last.retry_after_s
            if last.kind == "rejected" or attempts >= self._policy.attempts:
                raise last
            self.counts["retries"] += 1
            await self._sleep(self._backoff(tries), deadline)

    async def _attempt(self, request: Request, server: Server, deadline: float, probes: bool) -> Any:
        """One attempt on one server; `probes`: as the single request after its breaker was open.

        Raises RequestError with the kind of failure.
        """
        assert self._session is not None, "HttpPool is used outside its context"
        loop = asyncio.get_running_loop()
        begin: float | None = None
        try:
            async with asyncio.timeout_at(deadline), self._slots:
                begin = loop.time()
                if not probes and server.available_in(begin):
                    raise _ClosedMeanwhileError
                async with (
                    asyncio.timeout_at(begin + self._call_timeout_s),
                    self._session.post(
                        server.url + request.path,
                        data=request.body(server),
                        headers=server.headers,
                        allow_redirects=False,
                        proxy=server.proxy.url,
                        proxy_headers=server.proxy.headers,
                    ) as response,
                ):
                    content = masked_reply(await read_reply(response), server.key)
            if response.status == 200:
                result = _parsed(request, content)
                server.succeeded()
                self.counts["requests"] += 1
                self.latencies.append(loop.time() - begin)
                return result
            failure = _status_failure(server, response, content, self._policy.longest_retry_after_s)
        except TimeoutError:
            if begin is None:
                raise RequestError("deadline", "other requests took all the time") from None
            kind = "deadline" if loop.time() >= deadline else "timeout"
            failure = RequestError(kind, f"{server.url} did not answer in time")
        except aiohttp.ClientConnectorError as error:
            failure = _failure("connection", server, plain(error))
        except (BadResponseError, ReplyTooLongError) as error:
            failure = _failure("bad-response", server, str(error))
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: of what aiohttp cannot decode
            failure = _failure("disconnected", server, plain(error))
        finally:
            server.probing &= not probes
        self._note(failure, server)
        raise failure

    def _note(self, failure: RequestError, server: Server) -> None:
        """What a failure says about the server's health: nothing, if it merely refused this request."""
        now = asyncio.get_running_loop().time()
        if failure.retry_after_s:
            server.close_until(now + failure.retry_after_s)
            self.counts["retry-after"] += 1
        elif failure.kind != "rejected" and server.failed(now, self._policy):
            self.counts["breaker-opened"] += 1

    async def _acquire(
        self, candidates: Sequence[Server], tries: int, deadline: float, last: RequestError
    ) -> tuple[Server, bool]:
        """The server to ask once breaker and rate limit let a request through, and whether as its probe.

        Raises RequestError at the deadline.
        """
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            server = self._choose(candidates, tries, now)
            delay = server.available_in(now) or server.bucket.wait_s(now)
            if now + delay >= deadline:
                limited = last.kind == "rate-limited" or all(other.closed_until > now for other in candidates)
                raise RequestError("rate-limited" if limited else "deadline", f"last failure: {last}")
            if delay <= 0.0:
                server.probing = probes = server.open_until != 0.0
                self.counts["failovers"] += server is not candidates[0]
                return server, probes
            await asyncio.sleep(delay)

    @staticmethod
    async def _sleep(seconds: float, deadline: float) -> None:
        await asyncio.sleep(min(seconds, max(0.0, deadline - asyncio.get_running_loop().time())))

    @staticmethod
    def _choose(candidates: Sequence[Server], tries: int, now: float) -> Server:
        """The first available server in routing order; each retry starts one further. All unavailable: the soonest."""
        turn = tries % len(candidates)
        return min([*candidates[turn:], *candidates[:turn]], key=lambda server: server.available_in(now))

    def _route(self, affinity: int) -> list[Server]:
        """Servers by rendezvous hashing: the order changes little when a server is added or removed."""
        if len(self.servers) == 1:
            return self.servers
        return sorted(self.servers, key=lambda server: _hash(f"{server.url}\x00{affinity}"))

    def _backoff(self, tries: int) -> float:
        longest = min(self._policy.longest_s, self._policy.first_s * 2 ** min(tries - 1, 30))
        return self._random.uniform(0.0, longest)


def _parsed(request: Request, content: bytes) -> Any:
    """What the caller makes of a reply. Whatever a reply does to a parser is the reply's fault: BadResponseError."""
    try:
        return request.parse(orjson.loads(content))
    except BadResponseError:
        raise
    except Exception as error:
        raise BadResponseError(f"not to be read: {plain(error)}") from None


def _failure(kind: str, server: Server, detail: str) -> RequestError:
    return RequestError(kind, f"{server.url}: {printable(masked(detail, server.key))[:500]}")


def _status_failure(
    server: Server, response: aiohttp.ClientResponse, content: bytes, longest_retry_after_s: float
) -> RequestError:
    status = response.status
    if 300 <= status < 400:
        place = response.headers.get("Location", "elsewhere")
        return _failure(
            "rejected", server, f"status {status}: redirects to {place}, which is not followed: give that URL"
        )
    kind = {429: "rate-limited"}.get(status, "server-error") if status in RETRIED_STATUS else "rejected"
    text = printable(content[:REFUSAL_BYTES].decode(errors="replace"))
    retry_after = min(_retry_after_s(response.headers.get("Retry-After")), longest_retry_after_s)
    return RequestError(
        kind,
        f"{server.url}: status {status}: {text[:300]}",
        retry_after if status in RETRIED_STATUS else 0.0,
        refusal=text if status in (400, 422) else "",
    )


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
