"""Asynchronous client of a pool of SGLang engines: sampling, and control of all engines together.

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
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from megatron_sip.rollout.handshake import ModelContract, check_engine
from megatron_sip.rollout.protocol import (
    RETRYABLE,
    Completion,
    EngineError,
    Failure,
    FailureKind,
    SamplingSettings,
    generate_body,
    read_reply,
)
from megatron_sip.serving.blocking_call import send
from megatron_sip.serving.http_reply import shown_url, url_mistake

log = logging.getLogger(__name__)

# SGLang's HTTP server closes an idle connection after 5 s; we must give it up first or lose a request on it.
KEEP_ALIVE_S = 4.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Time in seconds. `call_timeout_s` bounds one HTTP call, `deadline_s` a request with all its retries.

    `max_concurrency` calls are in flight for each engine, each sent to the one with the fewest. `key` is what the engines
    demand as a bearer token, `vocab_size` what all token ids must be below.
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

    async def __aexit__(self, *_: object) -> None:
        for probe in self._probes:
            probe.cancel()
        if self._version_check is not None:
            self._version_check.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- sampling -------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        seeds: Sequence[int] | None = None,
        weight_version: str | None = None,
    ) -> list[list[Completion] | Failure]:
        """Sample `settings.n` completions of each prefix (token ids); one entry per prefix, in order.

        `seeds`, one per prefix, are honoured only by engines that `take_seeds`. With `weight_version`, a
        completion by any other version is thrown away and asked for elsewhere; engines that are known to have another
        get no request. Raises ValueError for bad arguments only.
        """
        if seeds is not None and len(seeds) != len(prefixes):
            raise ValueError(f"{len(seeds)} seeds for {len(prefixes)} prefixes")
        if any(not prefix for prefix in prefixes):
            raise ValueError("an empty prefix cannot be continued: give at least one token (for example BOS)")
        await self._find_stale(weight_version)
        given = [None] * len(prefixes) if seeds is None else seeds
        bodies = (generate_body(prefix, settings, seed) for prefix, seed in zip(prefixes, given, strict=True))
        return await asyncio.gather(*(self._request(body, settings, weight_version) for body in bodies))

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
        found = await asyncio.gather(*(self._control(url, "GET", "/server_info") for url in self.urls))
        return all(isinstance(info, dict) and info.get("enable_deterministic_inference") is True for info in found)

    async def check_compatible(self, contract: ModelContract) -> None:
        """Raise ValueError when an engine's vocabulary, context or tokenizer is not the trainer's."""
        await asyncio.gather(*(check_engine(self._control, url, contract) for url in self.urls))

    # --- one request ----------------------------------------------------------------------------------------------

    async def _request(
        self, body: dict[str, Any], settings: SamplingSettings, weight_version: str | None
    ) -> list[Completion] | Failure:
        """One /generate request with retries, in the time of `deadline_s`."""
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
                            return await self._attempt(tried, body, settings, weight_version)
                        except EngineError as error:
                            last = str(error)
                            raise
        except EngineError as error:
            return self._failed(error.kind, str(error))
        except TimeoutError:
            return self._failed("deadline", f"no result within {self.settings.deadline_s:g} s; last: {last}")
        raise AssertionError("unreachable")

    async def _attempt(
        self, tried: list[str], body: dict[str, Any], settings: SamplingSettings, weight_version: str | None
    ) -> list[Completion]:
        async with self._lease(tried) as engine:
            started = time.monotonic()
            self.counters.calls += 1
            try:
                reply = await self._send(engine.url, "POST", "/generate", body, self.settings.call_timeout_s)
                result, (prompt, cached, completion) = read_reply(
                    reply, engine.url, settings, self.settings.vocab_size, weight_version
                )
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
    async def _lease(self, tried: list[str]) -> AsyncIterator[_Engine]:
        """An engine that is up, and preferably not yet tried by this request; waits for one when all are down.

        Raises EngineError("stale-weights") when all are down for that reason: only a push of weights would help.
        """
        self._probe_due_engines()
        while (engine := self._choose(tried)) is None:
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

    def _choose(self, tried: Sequence[str]) -> _Engine | None:
        up = [engine for engine in self._engines if engine.down_until == 0.0]
        return min(up, key=lambda engine: (tried.count(engine.url), engine.in_flight), default=None)

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
        if self.counters.failures[kind] == 1:  # the first of its kind is worth a line, not a flood
            log.warning("rollouts of a prompt are missing: %s", reason)
        return Failure(kind, reason)

    async def _control(self, url: str, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        return await self._send(url, method, path, body, timeout_s or self.settings.control_timeout_s)

    async def _send(self, url: str, method: str, path: str, body: Any, timeout_s: float) -> Any:
        if self._session is None:
            raise RuntimeError("use the pool as an async context manager: async with SGLangPool(urls) as pool")
        return await send(
            self._session,
            url,
            method,
            path,
            body,
            timeout_s=timeout_s,
            connect_timeout_s=self.settings.connect_timeout_s,
            key=self.settings.key,
        )
