"""HTTP requests to several interchangeable servers: bounded, rate-limited, retried, timed out, counted.

    pool = HttpPool([Server(url) for url in urls], concurrency=256)
    async with pool:
        result = await pool.send(Request(affinity, path, body, parse), deadline=loop.time() + 60)

A request goes to the server of its prompt's number (all requests of one prompt to one server, whose prefix cache then has
it, and prompts to the servers in turn) or, without one, to the server with the fewest requests; to another one when that
fails. A server that fails
repeatedly is left alone for a while (circuit breaker) and then probed, by one request or by the pool's `check`; so is one
that names a time in Retry-After. A refused connection and such a time cost no attempt: the request goes elsewhere, and
only when there is no server left waits, up to its deadline. Every failure ends in RequestError with a kind to count,
never in a result. With a `silence_s` a request also ends once no server has answered anything for so long: servers that are
slow are waited for, servers that are gone are not. The time counts anew when one ends and when it takes connections again: it
is being started again, and was.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Self

import aiohttp
import orjson

from megatron_sip.serving.failures import BadResponseError, RequestError, failure, readable, status_failure
from megatron_sip.serving.http_reply import ReplyTooLongError, masked_reply, plain, read_reply
from megatron_sip.serving.patience import waits_until
from megatron_sip.serving.server import RetryPolicy, Server

KEPT_LATENCIES = 4096
UNANSWERED = frozenset({"timeout", "deadline", "connection", "disconnected"})
# SGLang's HTTP server closes an idle connection after 5 s; we must give it up first or lose a request on it.
KEEP_ALIVE_S = 4.0


@dataclass(frozen=True, slots=True)
class Request:
    """What to send: `body` may depend on the chosen server. `parse` gets the JSON value of the response.

    affinity: the prompt's number, see `dealt`; None: to the server with the fewest requests in flight, of equal ones the first.
    """

    affinity: int | None
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
        silence_s: float = math.inf,
        connect_timeout_s: float = 10.0,
        policy: RetryPolicy | None = None,
        check: Callable[[Server], Awaitable[None]] | None = None,
        counted_as: Callable[[RequestError], str] = attrgetter("kind"),
        seed: int = 0,
    ) -> None:
        """concurrency: requests in flight at all servers together. seed: of the jitter between attempts.

        silence_s: a request of `send` ends when no server has answered any of them for so long; its deadline is then that of
        `longest_wait`.
        connect_timeout_s: for how long a server may take no connection.
        check: asks a server that has failed whether it may be used again, which it forbids by a RequestError; without it the
        next request finds out. counted_as: the name in `counts` of a failed attempt.
        """
        if not servers:
            raise ValueError("an HttpPool needs at least one server URL")
        self.servers = list(servers)
        self.counts: Counter[str] = Counter()
        self.latencies: deque[float] = deque(maxlen=KEPT_LATENCIES)
        """Seconds that the last requests took."""
        self._policy = policy or RetryPolicy()
        self.silence_s = silence_s
        self.unanswered = False
        """Whether a request ended without an answer since a server last answered any."""
        self.answered_at = -math.inf
        """When a server last answered a request of `send`, or ended or came back, in the event loop's time."""
        self._waiting = 0
        self._waiting_since = 0.0
        self._call_timeout_s = min(call_timeout_s, silence_s)
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s)
        self._check = check
        self._counted_as = counted_as
        self._slots = asyncio.Semaphore(concurrency)
        self._random = random.Random(seed)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar()
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for server in self.servers:
            if server.check is not None:
                server.check.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(self, request: Request, deadline: float) -> Any:
        """The parsed response. `deadline` in the event loop's time. Raises RequestError."""
        if not self._waiting:
            self._waiting_since = asyncio.get_running_loop().time()
        self._waiting += 1
        try:
            return await self._send(request, deadline)
        except RequestError as error:
            self.unanswered |= not error.status and error.kind in UNANSWERED
            raise
        finally:
            self._waiting -= 1

    def silent_s(self) -> float:
        """For how long requests have been waiting without any server answering any."""
        now = asyncio.get_running_loop().time()
        return now - max(self._waiting_since, self.answered_at) if self._waiting else 0.0

    def ended_in_silence(self) -> bool:
        """Whether requests ended because no server answered any; an open breaker ends them that much earlier."""
        silent_s = asyncio.get_running_loop().time() - self.answered_at
        return self.unanswered and silent_s >= self.silence_s - self._policy.breaker_longest_s

    def _until(self, deadline: float) -> float:
        """When a request ends, unless a server answers one before."""
        return waits_until(deadline, self.silence_s, self.answered_at)

    async def _send(self, request: Request, deadline: float) -> Any:
        tried = Counter[str]()
        last = RequestError("deadline", "no attempt was possible before the deadline")
        attempts = 0
        while True:
            server, probes = await self._acquire(request, tried, deadline, last)
            try:
                return await self._attempt(request, server, probes, deadline)
            except RequestError as error:
                last = error
            finally:
                self._slots.release()
            self.counts[f"failed-attempts/{self._counted_as(last)}"] += 1
            tried[server.url] += 1
            attempts += last.kind != "connection" and not last.retry_after_s
            if last.kind == "rejected" or attempts >= self._policy.attempts:
                raise last
            self.counts["retries"] += 1
            pause = self._backoff(tried.total())
            await asyncio.sleep(min(pause, max(0.0, self._until(deadline) - asyncio.get_running_loop().time())))

    async def call(self, server: Server, method: str, path: str, body: Any = None, *, timeout_s: float) -> Any:
        """One call to one server, beside all bounds: the JSON value (or text, when it is none) that it answers.

        Raises RequestError.
        """
        data = None if body is None else orjson.dumps(body)
        until = asyncio.get_running_loop().time() + timeout_s
        try:
            content = await self._exchange(server, method, path, data, until)
        except RequestError as error:
            if error.kind == "timeout":
                raise failure("timeout", server.url + path, None, f"gave no answer within {timeout_s:g} s") from None
            raise
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError:
            return content.decode(errors="replace")

    def start_checks(self) -> list[asyncio.Task[None]]:
        """Have all servers checked now; those that could be reached when last heard of are worth waiting for."""
        reached = [not server.open_until or server.stale for server in self.servers]
        started = [self._start_check(server) for server in self.servers]
        return [task for task, worth in zip(started, reached, strict=True) if worth]

    async def _acquire(
        self, request: Request, tried: Counter[str], deadline: float, last: RequestError
    ) -> tuple[Server, bool]:
        """A slot, the server to ask in it, and whether as its probe; once breaker and rate limit let a request through.

        Raises RequestError at the deadline, or when waiting is in vain.
        """
        loop = asyncio.get_running_loop()
        home = self.servers[(request.affinity or 0) % len(self.servers)]
        while True:
            try:
                async with asyncio.timeout_at(self._until(deadline)):
                    await self._slots.acquire()
            except TimeoutError:
                if loop.time() < self._until(deadline):
                    continue  # others were answered meanwhile
                raise RequestError("deadline", f"other requests took all the time; last failure: {last}") from None
            now, until = loop.time(), self._until(deadline)
            server = self._choose(request, tried, now)
            delay = server.available_in(now) or server.bucket.wait_s(now)
            if delay <= 0.0 and now < until:
                server.probing = probes = server.open_until != 0.0
                self.counts["failovers"] += server is not home
                return server, probes
            self._slots.release()
            if all(server.stale for server in self.servers):
                raise RequestError("stale-weights", "; ".join(server.stale for server in self.servers))
            if now + delay >= until:
                limited = last.kind == "rate-limited" or all(other.closed_until > now for other in self.servers)
                raise RequestError("rate-limited" if limited else "deadline", f"last failure: {last}")
            await asyncio.sleep(delay)

    async def _attempt(self, request: Request, server: Server, probes: bool, deadline: float) -> Any:
        """One attempt on one server; `probes`: as the single request after its breaker was open.

        Raises RequestError with the kind of failure.
        """
        loop = asyncio.get_running_loop()
        begin = loop.time()
        until = min(deadline, begin + self._call_timeout_s)
        server.in_flight += 1
        server.calls += 1
        try:
            content = await self._answer(request, server, until)
            with readable():
                result = request.parse(orjson.loads(content))
            if self._check is None or not server.open_until:  # one that was asked before the failure proves nothing
                server.succeeded()
            self.counts["requests"] += 1
            self.latencies.append(loop.time() - begin)
            return result
        except BadResponseError as error:
            failed = failure(error.kind, server.url + request.path, server.key, str(error))
        except RequestError as error:
            is_late = error.kind == "timeout" and loop.time() >= self._until(deadline)
            failed = RequestError("deadline", error.detail) if is_late else error
        finally:
            server.in_flight -= 1
            server.seconds += loop.time() - begin
            server.probing &= not probes
        self._note(failed, server)
        raise failed

    async def _answer(self, request: Request, server: Server, until: float) -> bytes:
        """As `_exchange`. An answer of any status ends the silence; none to `call` does: who hangs may still tell facts."""
        try:
            content = await self._exchange(server, "POST", request.path, request.body(server), until)
        except RequestError as error:
            turned = server.turned(error.kind == "connection")
            if turned or error.status or error.kind == "bad-response":
                self._end_silence()
            raise
        server.turned(False)
        self._end_silence()
        return content

    def _end_silence(self) -> None:
        self.answered_at, self.unanswered = asyncio.get_running_loop().time(), False

    async def _exchange(self, server: Server, method: str, path: str, data: bytes | None, until: float) -> bytes:
        """The body of an answer with status 200 that came before the loop's time `until`. Raises RequestError."""
        if self._session is None:
            raise RuntimeError("use the pool as an async context manager: async with pool")
        where, key = server.url + path, server.key
        try:
            async with (
                asyncio.timeout_at(until),
                self._session.request(
                    method,
                    where,
                    data=data,
                    headers=server.headers,
                    allow_redirects=False,
                    proxy=server.proxy.url,
                    proxy_headers=server.proxy.headers,
                ) as response,
            ):
                content = masked_reply(await read_reply(response), key)
        except aiohttp.ConnectionTimeoutError:  # of a node that has vanished, say
            raise failure("connection", where, key, "took no connection in time") from None
        except TimeoutError:
            raise failure("timeout", where, key, "gave no answer in time") from None
        except aiohttp.ClientConnectorError as error:
            raise failure("connection", where, key, plain(error)) from None
        except ReplyTooLongError as error:
            raise failure("bad-response", where, key, str(error)) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: of what aiohttp cannot decode
            raise failure("disconnected", where, key, plain(error)) from None
        if response.status != 200:
            raise status_failure(where, key, response.status, response.headers, content)
        return content

    def _note(self, error: RequestError, server: Server) -> None:
        """What a failure says about the server's health: nothing, if it merely refused this request."""
        now = asyncio.get_running_loop().time()
        if error.kind == "deadline" and self._check is not None:
            return  # it may have waited for its turn; the server's own time-out is another kind
        if error.retry_after_s:
            server.close_until(now + min(error.retry_after_s, self._policy.longest_retry_after_s))
            self.counts["retry-after"] += 1
        elif error.kind != "rejected" and server.failed(now, self._policy, error):
            self.counts["breaker-opened"] += 1

    def _choose(self, request: Request, tried: Counter[str], now: float) -> Server:
        """Of the servers that are available first and least tried the one that is the prompt's or has the fewest requests."""
        if self._check is not None:
            for server in self.servers:
                if server.open_until and not server.probing and not server.available_in(now):
                    self._start_check(server)
        ranks = [(server.available_in(now), tried[server.url]) for server in self.servers]
        ready = [place for place, rank in enumerate(ranks) if rank == min(ranks)]
        if request.affinity is None:
            return min((self.servers[place] for place in ready), key=attrgetter("in_flight"))
        return self.servers[dealt(request.affinity, ready, len(self.servers))]

    def _start_check(self, server: Server) -> asyncio.Task[None]:
        if server.check is not None:
            server.check.cancel()  # its answer may be from before what is to be checked
        server.probing = True
        server.check = asyncio.get_running_loop().create_task(self._run_check(server))
        return server.check

    async def _run_check(self, server: Server) -> None:
        assert self._check is not None
        try:
            await self._check(server)
        except Exception as error:
            refused = error if isinstance(error, RequestError) else RequestError("bad-response", plain(error))
            server.failed(asyncio.get_running_loop().time(), self._policy, refused)
        else:
            server.succeeded()

    def _backoff(self, tries: int) -> float:
        longest = min(self._policy.longest_s, self._policy.first_s * 2 ** min(tries - 1, 30))
        return self._random.uniform(0.0, longest)


def dealt(number: int, ready: Sequence[int], count: int) -> int:
    """The place, of those that are `ready` of `count` servers, for prompt `number`: its own, or one of the others.

    Consecutive numbers go to the servers in turn. Those whose server is not ready are counted, and go to the ready ones in
    turn, until it is back: whatever fails, shares differ by two prompts at most. It needs no memory, so that the clients of
    several processes, which have consecutive numbers together, fill the servers evenly together.
    """
    turn, home = divmod(number, count)
    if home in ready:
        return home
    away = [place for place in range(count) if place not in ready]
    return ready[(turn * len(away) + away.index(home)) % len(ready)]
