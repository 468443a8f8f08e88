"""Asynchronous client of the SGLang engines: sampling, and control of all engines together.

    async with SGLangPool(["http://10.0.0.1:30000", "http://10.0.0.2:30000"]) as pool:
        await pool.wait_ready()
        results = await pool.generate(prefixes, SamplingSettings(max_new_tokens=128, n=16))

An HttpPool (`serving.http` says what becomes of failures) that knows of weight versions: an engine that failed is asked for
its weights before it is used again, and one with other weights than are asked for is left out until it has them. Results
come in the order of the input, and what could not be had is a `Failure`, counted by kind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeVar

import orjson

from megatron_sip.errors import DataError
from megatron_sip.rollout.handshake import ModelContract, check_engine, version_of_run
from megatron_sip.rollout.sampling import (
    Completion,
    Failure,
    SamplingSettings,
    logprobs_body,
    read_completions,
    read_logprobs,
    sampling_body,
)
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.http import HttpPool, Request
from megatron_sip.serving.http_reply import shown_url, url_mistake
from megatron_sip.serving.patience import longest_wait
from megatron_sip.serving.server import RetryPolicy, Server
from megatron_sip.serving.sglang_wire import GENERATE_PATH

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Time in seconds. `call_timeout_s` bounds one HTTP call, `deadline_s` a request with all its retries, from when it is
    made or, if later, from the engines' last answer to any (`serving.patience`).

    `max_concurrency` calls are in flight for each engine, each sent to the one with the fewest. An engine that failed is left
    alone for `down_s`. `key` is what the engines demand as a bearer token, `vocab_size` what all token ids must be below.
    `run_id` is the run whose weights are asked for: the same version of another run's is none of this.
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
    run_id: str = ""

    @property
    def policy(self) -> RetryPolicy:
        return RetryPolicy(
            attempts=self.attempts,
            first_s=self.backoff_s,
            longest_s=self.max_backoff_s,
            breaker_failures=1,
            breaker_first_s=self.down_s,
            breaker_longest_s=self.down_s,
            longest_retry_after_s=self.max_backoff_s,
        )


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


class SGLangPool:
    """Client of one or more engines with the same model. Use as an async context manager, in one event loop."""

    def __init__(self, urls: Sequence[str], settings: PoolSettings | None = None) -> None:
        if not urls:
            raise DataError("an SGLang pool needs at least one engine URL, for example http://127.0.0.1:30000")
        for url in urls:
            if mistake := url_mistake(url):
                raise DataError(f"engine URL {shown_url(url)}: {mistake}")
        self.settings = settings or PoolSettings()
        self._http = HttpPool(
            [Server(url, self.settings.key) for url in urls],
            concurrency=self.settings.max_concurrency * len(urls),
            call_timeout_s=self.settings.call_timeout_s,
            silence_s=self.settings.deadline_s,
            connect_timeout_s=self.settings.connect_timeout_s,
            policy=self.settings.policy,
            check=self._check_version,
            counted_as=counted_as,
        )
        self._tokens = PoolCounters()
        self._version: str | None = None
        self._version_checks: list[asyncio.Task[None]] = []

    @property
    def urls(self) -> list[str]:
        """Base URLs of the engines, in the order given."""
        return [server.url for server in self._http.servers]

    @property
    def counters(self) -> PoolCounters:
        counts, servers = self._http.counts, self._http.servers
        attempts = {name: count for name, count in counts.items() if name.startswith("failed-attempts/")}
        return replace(
            self._tokens,
            calls=sum(server.calls for server in servers),
            retries=counts["retries"],
            seconds=sum(server.seconds for server in servers),
            attempt_failures=Counter({name.partition("/")[2]: count for name, count in attempts.items()}),
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.__aexit__(*exc_info)

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
        wanted = self._of_run(weight_version)
        await self._admit(wanted)
        given = [None] * len(prefixes) if seeds is None else seeds
        bodies = (sampling_body(prefix, settings, seed) for prefix, seed in zip(prefixes, given, strict=True))
        read = partial(read_completions, settings=settings, vocab_size=self.settings.vocab_size, weight_version=wanted)
        found = await asyncio.gather(*(self._request(body, read) for body in bodies))
        if weight_version is None:
            return found
        return [
            made if isinstance(made, Failure) else [replace(one, weight_version=weight_version) for one in made]
            for made in found
        ]

    async def logprobs(
        self,
        prefixes: Sequence[Sequence[int]],
        continuations: Sequence[Sequence[int]],
        *,
        weight_version: str | None = None,
    ) -> list[list[float] | Failure]:
        """The model's log-probs (natural log) of each continuation's tokens after its prefix; one entry per pair, in order.

        Prefixes that several share are computed once: what is in the engine's cache of them is used. `weight_version` as for
        `generate`. Raises ValueError for an empty prefix or continuation.
        """
        pairs = list(zip(prefixes, continuations, strict=True))
        if any(not prefix or not continuation for prefix, continuation in pairs):
            raise ValueError("a prefix and a continuation need at least one token each (for example BOS)")
        wanted = self._of_run(weight_version)
        await self._admit(wanted)
        read = partial(read_logprobs, weight_version=wanted)
        requests = ((logprobs_body(*pair), partial(read, continuation=pair[1])) for pair in pairs)
        return await asyncio.gather(*(self._request(body, read) for body, read in requests))

    async def _request(
        self, body: dict[str, Any], read: Callable[[Any], tuple[list[T], tuple[int, int, int]]]
    ) -> list[T] | Failure:
        """What `read` makes of the reply to a /generate request, its tokens counted."""
        data = orjson.dumps(body)
        request = Request(None, GENERATE_PATH, lambda _: data, read)
        deadline = longest_wait(asyncio.get_running_loop().time(), self.settings.deadline_s)
        try:
            found, (prompt, cached, completion) = await self._http.send(request, deadline)
        except RequestError as error:
            return self._failed(error)
        self._tokens.prompt_tokens += prompt
        self._tokens.cached_tokens += cached
        self._tokens.completion_tokens += completion
        return list(found)

    def _failed(self, error: RequestError) -> Failure:
        kind = counted_as(error)
        self._tokens.failures[kind] += 1
        if self._tokens.failures[kind] == 1:  # the first of its kind is worth a line, not a flood
            log.warning("rollouts of a prompt are missing: %s", error)
        return Failure(kind, str(error))

    # --- weight versions ------------------------------------------------------------------------------------------

    def _of_run(self, version: str | None) -> str | None:
        return version if version is None else version_of_run(self.settings.run_id, version)

    async def _admit(self, version: str | None) -> None:
        """When other weights are asked for than last, find out first who has them.

        An engine that missed a push may even be paused: a request to it would take all of its time. Those that were down are
        asked as well, but not waited for.
        """
        if version is not None and version != self._version:
            self._version = version
            self._version_checks = self._http.start_checks()
        if self._version_checks:
            await asyncio.wait(self._version_checks)

    async def _check_version(self, server: Server) -> None:
        """Raise RequestError unless the engine answers and has the weights that were asked for last."""
        # One that has failed may hang; what it would serve meanwhile others do.
        limit = self.settings.connect_timeout_s if server.open_until else None
        info = await self._control(server, "GET", "/model_info", timeout_s=limit)
        found = str(info["weight_version"])[:200]
        if self._version is not None and found != self._version:
            raise RequestError("stale-weights", f"{server.url}: has weights {found!r}, not {self._version!r}")

    # --- all engines ----------------------------------------------------------------------------------------------

    async def wait_ready(self, timeout_s: float = 25.0) -> None:
        """Return when every engine answers /model_info; else raise RequestError naming those that do not."""
        deadline = time.monotonic() + timeout_s

        async def wait(server: Server) -> str | None:
            while True:
                try:
                    await self._control(server, "GET", "/model_info", timeout_s=min(5.0, timeout_s))
                    return None
                except RequestError as error:
                    if time.monotonic() + 0.5 > deadline:
                        return str(error)
                await asyncio.sleep(0.5)

        silent = [error for error in await asyncio.gather(*map(wait, self._http.servers)) if error is not None]
        if silent:
            raise RequestError(
                "connection",
                f"{', '.join(self.urls)}: no SGLang engine answered within {timeout_s:.0f} s: {'; '.join(silent)}. Check that "
                "the server is running and that the URL (host and port) is right, or let the trainer start engines itself",
            )

    async def take_seeds(self) -> bool:
        """Whether every engine samples by the seeds it is given, which SGLang does with deterministic inference alone."""
        found = await asyncio.gather(*(self._control(server, "GET", "/server_info") for server in self._http.servers))
        return all(isinstance(info, dict) and info.get("enable_deterministic_inference") is True for info in found)

    async def check_compatible(self, contract: ModelContract) -> None:
        """Raise ValueError when an engine's vocabulary, context or tokenizer is not the trainer's."""
        await asyncio.gather(
            *(check_engine(partial(self._control, server), server.url, contract) for server in self._http.servers)
        )

    async def _control(
        self, server: Server, method: str, path: str, body: Any = None, timeout_s: float | None = None
    ) -> Any:
        limit = timeout_s or self.settings.control_timeout_s
        return await self._http.call(server, method, path, body, timeout_s=limit)


def counted_as(error: RequestError) -> str:
    """The name that engines' failures have in the metrics of all runs: an HTTP status goes by its hundred."""
    if error.status:
        return f"http-{error.status // 100}xx"
    return "connection" if error.kind == "disconnected" else error.kind
