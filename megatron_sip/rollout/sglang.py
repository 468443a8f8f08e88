"""Asynchronous client of a pool of SGLang engines: sampling, scoring, and control of all engines together.

    async with SGLangPool(["http://10.0.0.1:30000", "http://10.0.0.2:30000"]) as pool:
        await pool.wait_ready()
        results = await pool.generate(prefixes, SamplingSettings(max_new_tokens=128, n=16))

A call goes to one engine; when that fails in a way another engine may cure, it is retried there after a jittered
pause. An engine that fails is left alone for a while and asked for its health before it is used again. So is one with
other weights than are asked for, until it has them. Results come in the order of the input, and what could not be had
is a `Failure`, counted by kind.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from megatron_sip.http_reply import shown_url, url_mistake
from megatron_sip.rollout.compatibility import ModelContract, check_engine
from megatron_sip.rollout.http import send
from megatron_sip.rollout.protocol import (
    RETRYABLE,
    Completion,
    EngineError,
    Failure,
    FailureKind,
    SamplingSettings,
    generate_body,
    parse_completions,
    parse_scores,
    read_reply,
    score_body,
)

__all__ = [
    "Completion",
    "EngineError",
    "Failure",
    "ModelContract",
    "PoolCounters",
    "PoolSettings",
    "SGLangPool",
    "SamplingSettings",
]

# SGLang's HTTP server closes an idle connection after 5 s; we must give it up first or lose a request on it.
KEEP_ALIVE_S = 4.0
# Below this many prefix tokens a prefill is cheaper than the extra round trip that would cache it.
MIN_CACHED_PREFIX = 64


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Time in seconds. `call_timeout_s` bounds one HTTP call, `deadline_s` a request with all its retries.

    `max_concurrency` calls are in flight for each engine. Routing: "least-loaded", or "prefix" (calls with the same
    first `affinity_tokens` tokens go to the same engine while it is up, so that they share its radix cache). `key` is what
    the engines demand as a bearer token, `vocab_size` what all token ids must be below.
    """

    call_timeout_s: float = 300.0
    connect_timeout_s: float = 5.0
    deadline_s: float = 900.0
    control_timeout_s: float = 60.0
    attempts: int = 4
    backoff_s: float = 0.25
    max_backoff_s: float = 5.0
    max_concurrency: int = 64
    down_s: float = 5.0
    routing: Literal["least-loaded", "prefix"] = "least-loaded"
    affinity_tokens: int = 256
    key: str | None = field(default=None, repr=False)
    vocab_size: int | None = None


@dataclass(slots=True)
class PoolCounters:
    """Totals since the pool was made. `failures` are requests lost for good, `attempt_failures` single calls."""

    calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    attempt_failures: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Engine:
    url: str
    in_flight: int = 0
    down_until: float = 0.0  # time.monotonic(); 0 while up
    stale: bool = False  # down because its weights are not those that were asked for last


class SGLangPool:
    """Client of one or more engines with the same model. Use as an async context manager, in one event loop."""

    def __init__(self, urls: Sequence[str], settings: PoolSettings | None = None) -> None:
        if not urls:
            raise ValueError("an SGLang pool needs at least one engine URL, for example http://127.0.0.1:30000")
        for url in urls:
            if mistake := url_mistake(url):
                raise ValueError(f"engine URL {shown_url(url)}: {mistake}")
        self.settings = settings or PoolSettings()
        self.counters = PoolCounters()
        self._engines = [_Engine(url.rstrip("/")) for url in urls]
        self._slots = asyncio.Semaphore(self.settings.max_concurrency * len(urls))
        self._session: aiohttp.ClientSession | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self._version: str | None = None
        self._version_check: asyncio.Future[list[None]] | None = None

    @property
    def urls(self) -> list[str]:
        """Base URLs of the engines, in the order given."""
        return [engine.url for engine in self._engines]

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for probe in self._probes:
            probe.cancel()
        if self._version_check is not None:
            self._version_check.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- sampling and scoring -------------------------------------------------------------------------------------

    async def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        seeds: Sequence[int] | None = None,
        weight_version: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion] | Failure]:
        """Sample `settings.n` completions of each prefix (token ids); one entry a prefix, in order.

        `seeds`, one a prefix, are honoured only by engines that `take_seeds`. With `weight_version`, a
        completion by any other version is thrown away and asked for elsewhere; engines that are known to have another
        get no request. `on_progress(done, total)` is called after each prefix. Raises ValueError for bad arguments only.
        """
        if seeds is not None and len(seeds) != len(prefixes):
            raise ValueError(f"{len(seeds)} seeds for {len(prefixes)} prefixes")
        if any(not prefix for prefix in prefixes):
            raise ValueError("an empty prefix cannot be continued: give at least one token (for example BOS)")
        await self._find_stale(weight_version)
        done = 0

        async def one(index: int, prefix: Sequence[int]) -> list[Completion] | Failure:
            nonlocal done
            body = generate_body(prefix, settings, None if seeds is None else seeds[index])
            parse = partial(parse_completions, settings=settings, vocab_size=self.settings.vocab_size)
            result = await self._request(prefix, body, parse, weight_version)
            done += 1
            if on_progress is not None:
                on_progress(done, len(prefixes))
            return result

        return list(await asyncio.gather(*(one(i, prefix) for i, prefix in enumerate(prefixes))))

    async def score(
        self,
        prefix: Sequence[int],
        continuations: Sequence[Sequence[int]],
        *,
        weight_version: str | None = None,
    ) -> list[list[float]] | Failure:
        """Log-probs (natural log, temperature 1) of each continuation's tokens after `prefix`, by prefill alone.

        The first continuation goes ahead, so that the others find the prefix in the radix cache.
        """
        if not prefix or any(not continuation for continuation in continuations):
            raise ValueError("scoring needs a prefix and continuations of at least one token each")
        if not continuations:
            return []
        await self._find_stale(weight_version)
        split = 1 if len(prefix) >= MIN_CACHED_PREFIX else len(continuations)
        scores: list[list[float]] = []
        for part in (continuations[:split], continuations[split:]):
            if part:
                parse = partial(parse_scores, continuations=part)
                found = await self._request(prefix, score_body(prefix, part), parse, weight_version)
                if isinstance(found, Failure):
                    return found
                scores.extend(found)
        return scores

    # --- all engines ----------------------------------------------------------------------------------------------

    async def wait_ready(self, timeout_s: float = 25.0) -> None:
        """Return when every engine answers /model_info; else raise EngineError naming those that do not."""
        deadline = time.monotonic() + timeout_s

        async def wait(url: str) -> str | None:
            while True:
                try:
                    await self._control(url, "GET", "/model_info", timeout_s=min(5.0, timeout_s))
                    return None
                except EngineError as error:
                    if time.monotonic() + 0.5 > deadline:
                        return str(error)
                await asyncio.sleep(0.5)

        silent = [error for error in await asyncio.gather(*map(wait, self.urls)) if error is not None]
        if silent:
            raise EngineError(
                "connection",
                ", ".join(self.urls),
                f"no SGLang engine answered within {timeout_s:.0f} s: {'; '.join(silent)}. Check that the server is "
                "running and that the URL (host and port) is right, or let the trainer start engines itself",
            )

    async def take_seeds(self) -> bool:
        """Whether every engine samples by the seeds it is given, which SGLang does with deterministic inference alone."""
        found = await self.call_all("GET", "/server_info")
        return all(isinstance(i, dict) and i.get("enable_deterministic_inference") is True for i in found.values())

    async def model_info(self) -> dict[str, dict[str, Any]]:
        """Each engine's /model_info by URL. Raises EngineError."""
        return await self.call_all("GET", "/model_info")

    async def check_versions(self, expected: str) -> None:
        """Raise EngineError("stale-weights") naming each engine whose weight version is not `expected`."""
        found = {url: str(info["weight_version"]) for url, info in (await self.model_info()).items()}
        wrong = {url: version for url, version in found.items() if version != expected}
        if wrong:
            listed = ", ".join(f"{url} has {version!r}" for url, version in wrong.items())
            raise EngineError("stale-weights", next(iter(wrong)), f"weights should be version {expected!r}: {listed}")

    async def check_compatible(self, contract: ModelContract) -> None:
        """Raise ValueError when an engine's vocabulary, context or tokenizer is not the trainer's."""
        await asyncio.gather(*(check_engine(self._control, url, contract) for url in self.urls))

    async def flush_cache(self) -> None:
        """Drop every engine's prefix cache. Raises EngineError when one cannot, for example with running requests."""
        await self.call_all("POST", "/flush_cache", params={"timeout": "10"})

    async def pause_generation(self, mode: Literal["abort", "retract", "in_place"] = "retract") -> None:
        """Stop all engines' inference; "retract" keeps requests and recomputes them on `continue_generation`."""
        await self.call_all("POST", "/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        """Resume after `pause_generation`."""
        await self.call_all("POST", "/continue_generation", {})

    async def call_all(
        self, method: str, path: str, body: Any = None, params: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Make one control call to every engine at once; replies by URL. Raises the first EngineError."""
        calls = (self._control(url, method, path, body, params) for url in self.urls)
        return dict(zip(self.urls, await asyncio.gather(*calls), strict=True))

    # --- one request ----------------------------------------------------------------------------------------------

    async def _request[Result](
        self,
        prefix: Sequence[int],
        body: dict[str, Any],
        parse: Callable[..., Result],
        weight_version: str | None,
    ) -> Result | Failure:
        """One /generate request with retries, in the time of `deadline_s`."""
        key = array("q", prefix[: self.settings.affinity_tokens]).tobytes()
        tried: list[str] = []
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.settings.attempts),
            wait=wait_random_exponential(self.settings.backoff_s, self.settings.max_backoff_s),
            retry=retry_if_exception(lambda error: isinstance(error, EngineError) and error.kind in RETRYABLE),
            before_sleep=self._count_retry,
            reraise=True,
        )
        last = "no engine is up"
        try:
            async with asyncio.timeout(self.settings.deadline_s), self._slots:
                async for attempt in retrying:
                    with attempt:
                        try:
                            return await self._attempt(key, tried, body, parse, weight_version)
                        except EngineError as error:
                            last = str(error)
                            raise
        except EngineError as error:
            return self._failed(error.kind, str(error))
        except TimeoutError:
            return self._failed("deadline", f"no result within {self.settings.deadline_s:g} s; last: {last}")
        raise AssertionError("unreachable")

    async def _attempt[Result](
        self,
        key: bytes,
        tried: list[str],
        body: dict[str, Any],
        parse: Callable[..., Result],
        weight_version: str | None,
    ) -> Result:
        async with self._lease(key, tried) as engine:
            started = time.monotonic()
            self.counters.calls += 1
            try:
                reply = await self._send(engine.url, "POST", "/generate", body, None, self.settings.call_timeout_s)
                result, (prompt, cached, completion) = read_reply(reply, engine.url, parse, weight_version)
            except EngineError as error:
                self.counters.attempt_failures[error.kind] += 1
                if error.kind in RETRYABLE:
                    engine.down_until = time.monotonic() + self.settings.down_s
                    engine.stale = error.kind == "stale-weights"
                raise
            finally:
                self.counters.seconds += time.monotonic() - started
        self.counters.prompt_tokens += prompt
        self.counters.cached_tokens += cached
        self.counters.completion_tokens += completion
        return result

    @asynccontextmanager
    async def _lease(self, key: bytes, tried: list[str]) -> AsyncIterator[_Engine]:
        """An engine that is up, and preferably not yet tried by this request; waits for one when all are down.

        Raises EngineError("stale-weights") when all are down for that reason: only a push of weights would help.
        """
        self._probe_due_engines()
        while (engine := self._choose(key, tried)) is None:
            if all(engine.stale for engine in self._engines):
                raise EngineError("stale-weights", ", ".join(self.urls), f"none has weights {self._version!r}")
            await asyncio.sleep(0.05)
            self._probe_due_engines()
        tried.append(engine.url)
        engine.in_flight += 1
        try:
            yield engine
        finally:
            engine.in_flight -= 1

    def _choose(self, key: bytes, tried: Sequence[str]) -> _Engine | None:
        up = [engine for engine in self._engines if engine.down_until == 0.0]
        if not up:
            return None
        if self.settings.routing == "least-loaded":
            return min(up, key=lambda engine: (tried.count(engine.url), engine.in_flight))
        # Rendezvous hashing: when an engine goes down only its own prefixes move.
        return min(up, key=lambda engine: (tried.count(engine.url), _affinity(key, engine.url)))

    def _probe_due_engines(self) -> None:
        now = time.monotonic()
        for engine in self._engines:
            if 0.0 < engine.down_until <= now:
                engine.down_until = float("inf")  # until the probe says more
                task = asyncio.create_task(self._probe(engine, self.settings.connect_timeout_s))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)

    async def _probe(self, engine: _Engine, timeout_s: float) -> None:
        """Up, when it answers and has the weights that were asked for last; down otherwise."""
        try:
            info = await self._control(engine.url, "GET", "/model_info", timeout_s=timeout_s)
            engine.stale = self._version is not None and str(info["weight_version"]) != self._version
            engine.down_until = time.monotonic() + self.settings.down_s if engine.stale else 0.0
        except (EngineError, KeyError, TypeError, IndexError):
            engine.stale = False
            engine.down_until = time.monotonic() + self.settings.down_s

    async def _find_stale(self, version: str | None) -> None:
        """When other weights are asked for than last, find out first who has them.

        An engine that missed a push may even be paused: a request to it would take all of its time.
        """
        if version is not None and version != self._version:
            self._version = version
            # Engines that were down are asked as well, but not waited for.
            lost = [engine for engine in self._engines if engine.down_until and not engine.stale]
            for engine in lost:
                engine.down_until = min(engine.down_until, time.monotonic())
            asked = [engine for engine in self._engines if engine not in lost]
            probes = (self._probe(engine, self.settings.control_timeout_s) for engine in asked)
            self._version_check = asyncio.gather(*probes)
        if self._version_check is not None:
            await asyncio.shield(self._version_check)

    def _count_retry(self, _: RetryCallState) -> None:
        self.counters.retries += 1

    def _failed(self, kind: FailureKind, reason: str) -> Failure:
        self.counters.failures[kind] += 1
        return Failure(kind, reason)

    async def _control(
        self,
        url: str,
        method: str,
        path: str,
        body: Any = None,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        return await self._send(url, method, path, body, params, timeout_s or self.settings.control_timeout_s)

    async def _send(
        self, url: str, method: str, path: str, body: Any, params: dict[str, str] | None, timeout_s: float
    ) -> Any:
        if self._session is None:
            raise RuntimeError("use the pool as an async context manager: async with SGLangPool(urls) as pool")
        return await send(
            self._session,
            url,
            method,
            path,
            body,
            params=params,
            timeout_s=timeout_s,
            connect_timeout_s=self.settings.connect_timeout_s,
            key=self.settings.key,
        )


def _affinity(key: bytes, url: str) -> bytes:
    return hashlib.blake2b(key + url.encode(), digest_size=8).digest()
