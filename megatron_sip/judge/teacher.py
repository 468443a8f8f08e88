"""Asks a judge's servers: calls in, answers out, through the cache, in batches where the server takes them.

    async with TeacherClient(settings) as client:
        answers = await client.ask(calls, affinity, deadline)

A failed call's answer is None, and is counted by kind. Nothing but a server's readable answer becomes an answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Self

import orjson

from megatron_sip.console import say
from megatron_sip.judge.cache import AnswerCache, cache_key
from megatron_sip.judge.calls import Answer, Call, GenerateCall, LikelihoodCall, cache_material, votes_that_came
from megatron_sip.judge.dialect import Dialect, Dialects, DialectTrial
from megatron_sip.judge.encoding import ChatEncoder, EncodingError
from megatron_sip.judge.prefix_window import PrefixWindow, estimated_tokens
from megatron_sip.judge.probe import EndpointError, EndpointFacts, model_name, probe
from megatron_sip.judge.reasoning import UNKNOWN, ReasoningStyle
from megatron_sip.judge.settings import DEFAULT_MODEL, ClientSettings, Endpoint, SettingsError
from megatron_sip.judge.wire import (
    OPENAI_PATH,
    answer_tokens,
    openai_answer,
    openai_body,
    sglang_answers,
    sglang_body,
)
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.http import HttpPool, Request
from megatron_sip.serving.http_reply import shown_url
from megatron_sip.serving.server import RetryPolicy, Server, TokenBucket
from megatron_sip.serving.sglang_wire import GENERATE_PATH

log = logging.getLogger(__name__)

PREFILL_BATCH = 32
"""Prompts in one native request that generates at most one token each."""
GENERATE_BATCH = 8
"""Prompts in one native request that generates: few, since the batch is as slow as its slowest answer."""
CHECK_TIMEOUT_S = 30.0
FIRST_REPORT_SECONDS, REPORT_SECONDS = 5.0, 60.0
"""When it is said that servers are waited for: at the start, and then each time."""
SHOWN_SERVERS = 3
"""As many are named; a job may have hundreds."""
UNREADABLE = {
    "aborted": "the server aborted or filtered it",
    "cut": "it reached its limit of tokens (--judge-max-tokens, --teacher-reasoning-tokens)",
    "in-reasoning": "its reasoning never ended; it may need more tokens for it (--teacher-reasoning-tokens)",
    "no-verdict": "it holds no verdict",
    "verdict-not-last": "it does not end with its verdict; if that is how the judge is meant to answer, its prompt file "
    "needs position = 'anywhere'",
}
TEMPLATE_TOKENS = 128
"""Allowed for a chat template that only the server knows."""


class TeacherClient:
    """Transport of one judge. Use as an async context manager; `check` first, so that mistakes show at start."""

    def __init__(self, settings: ClientSettings, silence_s: float = math.inf, report_s: float = REPORT_SECONDS) -> None:
        """silence_s: calls fail once no server has answered any for so long; until then that is told every `report_s`."""
        self.settings = settings
        self._report_s = report_s
        self._reporter: asyncio.Task[None] | None = None
        servers = [_server(endpoint, settings.replicas) for endpoint in settings.endpoints]
        self.pool = HttpPool(
            servers,
            concurrency=settings.in_flight,
            silence_s=silence_s,
            call_timeout_s=settings.call_timeout_s,
            policy=RetryPolicy(attempts=settings.attempts),
            seed=settings.seed,
        )
        self.counts: Counter[str] = Counter()
        self._cache: AnswerCache | None = None
        self._encoder = ChatEncoder.load(settings.tokenizer) if settings.tokenizer else None
        self._facts: dict[str, EndpointFacts] = {}
        self._dialects = Dialects()
        self._singly: set[str] = set()  # servers that gave fewer answers than n

    async def __aenter__(self) -> Self:
        if self.settings.cache_path is not None:
            self._cache = AnswerCache(self.settings.cache_path, counts=self.counts)
        await self.pool.__aenter__()
        if self.settings.tells and self.pool.silence_s < math.inf:
            self._reporter = asyncio.create_task(self._report_silence())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._reporter is not None:
            self._reporter.cancel()
        await self.pool.__aexit__(*exc_info)
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Wait until every endpoint answers. Raises EndpointError after `timeout_s`, EncodingError, SettingsError."""
        endpoint = self.settings.endpoint
        probes = [asyncio.create_task(probe(self.pool, server, endpoint, timeout_s)) for server in self.pool.servers]
        telling = asyncio.create_task(self._report_missing(probes, timeout_s))
        try:
            found = await asyncio.gather(*probes)
        finally:
            telling.cancel()
        for server, facts in zip(self.settings.endpoints, found, strict=True):
            self._facts[server.url] = facts
        self._require_one_model()
        for facts in found:
            if endpoint.kind == "sglang" and self._encoder is None and facts.tokenizer:
                try:
                    self._encoder = ChatEncoder.load(facts.tokenizer)
                except EncodingError as error:
                    raise EncodingError(f"{error}; give the judge's tokenizer explicitly") from error
        if endpoint.kind == "sglang":
            _ = self.encoder
            if self.reasoning.unknown and not endpoint.answer_prefix:
                raise EncodingError(
                    f"endpoint {endpoint.url}: the chat template ends with '{self.reasoning.unknown}', which seems to open "
                    f"reasoning, and what ends that is not known: give it with {endpoint.flag('answer-prefix')}"
                )
        if endpoint.prefill and self.reasoning.always:
            raise SettingsError(
                f"endpoint {endpoint.url}: prefill would begin answers inside the reasoning that the model's template "
                f"opens: leave out {endpoint.flag('prefill')}, or use {endpoint.flag('api')} sglang, which closes it first"
            )

    def _require_one_model(self) -> None:
        """Servers share prompts, as token ids, and what is kept of their answers. A model that is named in the settings is not
        looked at: the same one may lie in folders of other names. Raises EndpointError."""
        endpoint = self.settings.endpoint
        served = {url: facts.model for url, facts in self._facts.items() if facts.model is not None}
        if endpoint.model != DEFAULT_MODEL or len({model_name(model) for model in served.values()}) < 2:
            return
        (url, model), *others = served.items()
        other = next((url, name) for url, name in others if model_name(name) != model_name(model))
        raise EndpointError(
            f"judge endpoint {shown_url(url)} serves {model}, {shown_url(other[0])} serves {other[1]}: name servers of one "
            f"model, or give its name with {endpoint.flag('name')} where these are the same"
        )

    def servers_shown(self, servers: Sequence[Server] | None = None) -> str:
        """Whose servers these are, or some of them, and where, for people."""
        urls = [shown_url(server.url) for server in (self.pool.servers if servers is None else servers)]
        others = f" and {len(urls) - SHOWN_SERVERS} others" if len(urls) > SHOWN_SERVERS else ""
        return f"the {self.settings.endpoint.role.replace('_', ' ')} at {', '.join(urls[:SHOWN_SERVERS])}{others}"

    async def gone(self, timeout_s: float | None = None) -> str | None:
        """Why nobody is left to ask: calls ended in silence, and no server gives any answer now. None: somebody is there.

        timeout_s: for that answer; as long as for any call unless given, since servers may be slow.
        """
        if not self.pool.ended_in_silence():
            return None
        limit = max(CHECK_TIMEOUT_S, self.settings.call_timeout_s) if timeout_s is None else timeout_s
        found = await asyncio.gather(*(self._answers(server, limit) for server in self.pool.servers))
        return None if any(found) else f"{self.servers_shown()} answers no more"

    async def _answers(self, server: Server, timeout_s: float) -> bool:
        """Whether a server still answers a request of one token. SGLang says itself whether anything comes from its model."""
        ask = partial(self.pool.call, server, timeout_s=timeout_s)
        message = {"role": "user", "content": "1"}
        body = {"model": self.settings.endpoint.model, "messages": [message], "max_tokens": 1}
        try:
            if self.settings.endpoint.kind == "sglang":
                await ask("GET", "/health_generate")
            else:
                await ask("POST", OPENAI_PATH, body)
        except RequestError as error:
            return 0 < error.status < 500  # it is there, and wants to be asked otherwise
        return True

    async def _report_missing(self, probes: Sequence[asyncio.Task[EndpointFacts]], timeout_s: float) -> None:
        """Say who has not answered yet, where that may take long."""
        clock, pause = asyncio.get_running_loop().time, FIRST_REPORT_SECONDS
        begin = clock()
        while self.settings.tells and timeout_s > 2 * FIRST_REPORT_SECONDS:
            await asyncio.sleep(pause)
            pause = self._report_s
            missing = [server for server, task in zip(self.pool.servers, probes, strict=True) if not task.done()]
            say(f"waiting for {self.servers_shown(missing)}: {clock() - begin:.0f} s of {timeout_s:.0f}")

    async def _report_silence(self) -> None:
        while True:
            await asyncio.sleep(self._report_s)
            silent = self.pool.silent_s()
            if silent >= self._report_s:
                say(f"waiting for {self.servers_shown()}: no answer for {silent:.0f} s of {self.pool.silence_s:.0f}")

    def window(self, chars: int) -> PrefixWindow:
        """How much of a prefix the servers may be shown, at most `chars`; after `check`."""
        given, facts = self.settings.endpoint.context_tokens, self._facts.values()
        known = [given] if given else [fact.context_tokens for fact in facts if fact.context_tokens is not None]
        count = estimated_tokens if self._encoder is None else lambda text: len(self.encoder.text(text))
        return PrefixWindow(chars, min(known) if known else None, count)

    def request_tokens(self, call: Call) -> int:
        """About how many tokens a call takes of its server's context, the answer included."""
        count = self.window(0).count
        return sum(map(count, call.prompt)) + answer_tokens(call, self.settings.endpoint) + TEMPLATE_TOKENS

    @property
    def encoder(self) -> ChatEncoder:
        """Raises SettingsError when there is no tokenizer for the sglang endpoints."""
        if self._encoder is None:
            raise SettingsError("an sglang judge endpoint needs the judge's tokenizer: give its folder")
        return self._encoder

    async def ask(
        self, calls: Sequence[Call], affinity: int | None, deadline: float, failures: Counter[str] | None = None
    ) -> list[Answer]:
        """Answers in the order of `calls`; None for a call that failed or had not ended at `deadline` (loop time).

        affinity: the number of the prompt whose calls share a server (`serving.http`), for one that has several; else None.
        `failures`, when given, is where failed calls, and what a server aborted, are also counted by kind.
        """
        failures = Counter() if failures is None else failures
        source = self._answer_source()
        keys = [cache_key(cache_material(call, source)) for call in calls]
        stored = self._cache.get_many(keys) if self._cache is not None else {}
        known: dict[bytes, Answer] = {key: answer for key, answer in stored.items() if answer is not None}
        open_calls = {key: call for key, call in zip(keys, calls, strict=True) if key not in known}
        self.counts["calls"] += len(calls)
        self.counts["cached"] += len(calls) - len(open_calls)
        if open_calls:
            failed: Counter[str] = Counter()
            fresh = await self._ask_servers(open_calls, affinity, deadline, failed)
            failures.update(failed)
            if self._cache is not None:
                kept = (
                    (key, votes_that_came(open_calls[key], answer, failed=bool(failed)))
                    for key, answer in fresh.items()
                )
                self._cache.put_many((key, answer) for key, answer in kept if answer is not None)
            known |= fresh
        return [known.get(key) for key in keys]

    def flush(self) -> None:
        if self._cache is not None:
            self._cache.flush()

    async def _ask_servers(
        self, calls: dict[bytes, Call], affinity: int | None, deadline: float, failures: Counter[str]
    ) -> dict[bytes, Answer]:
        one_each = self.settings.endpoint.kind == "openai"  # chat completions take no more
        batches = [[key] for key in calls] if one_each else _batches(calls)
        results = await asyncio.gather(
            *(self._send([calls[key] for key in batch], affinity, deadline, failures) for batch in batches)
        )
        answers: dict[bytes, Answer] = {}
        for batch, result in zip(batches, results, strict=True):
            if result is not None:
                answers.update(zip(batch, result, strict=True))
        return answers

    async def _send(
        self, calls: list[Call], affinity: int | None, deadline: float, failures: Counter[str]
    ) -> list[Answer] | None:
        sent: tuple[str, Dialect, dict[str, Any]] = ("", Dialect(), {})
        missing = 0  # answers of the `n` that were asked for

        def body(server: Server) -> bytes:
            nonlocal sent
            dialect = self._dialects.of(server.url)
            sent = server.url, dialect, self._body(calls, dialect)
            return orjson.dumps(sent[2])

        def parse(response: Any) -> list[Answer]:
            nonlocal missing
            asked = sent[2].get("n", 1)  # less than the call's `n` where the server refuses that parameter
            answers, aborted = self._parse(calls, response, asked)
            if aborted:
                failures["aborted"] += aborted
            wanted = calls[0].n if not is_native and isinstance(calls[0], GenerateCall) else 0
            missing = max(0, wanted - min(asked, len(response["choices"]))) if wanted else 0
            return answers

        is_native = self.settings.endpoint.kind == "sglang"
        request = Request(affinity, GENERATE_PATH if is_native else OPENAI_PATH, body, parse)
        trial = DialectTrial(self._dialects)
        while True:
            try:
                answers = await self.pool.send(request, deadline)
                break
            except RequestError as failure:
                if failure.refusal and trial.another(*sent, failure.refusal):
                    continue
                trial.undo()
                self._count_failure(failure, len(calls), failures)
                return None
        trial.keep(*sent[:2])
        first, answer = calls[0], answers[0]
        if missing and isinstance(first, GenerateCall) and isinstance(answer, list):
            self._say_once(sent[0], first.n - missing, first.n)
            ask = partial(self._send, [replace(first, n=1)], affinity, deadline, failures)
            singles = await asyncio.gather(*(ask() for _ in range(missing)))
            return [[*answer[:-missing], *map(_only, singles)]]
        return answers

    def _count_failure(self, failure: RequestError, calls: int, failures: Counter[str]) -> None:
        failures[failure.kind] += calls
        name = f"failed/{failure.kind}"
        self.counts[name] += calls
        if self.counts[name] == calls:  # the first of its kind is worth a line, not a flood
            log.warning("judge call failed, its votes are missing: %s", failure)

    def _say_once(self, url: str, given: int, asked: int) -> None:
        if url not in self._singly:
            self._singly.add(url)
            log.warning("judge server %s gave %d of %d answers: the others are asked for singly", url, given, asked)

    @property
    def model(self) -> str:
        """The name of the model that answers: as the settings or, after `check`, the server have it."""
        endpoint = self.settings.endpoint
        if endpoint.model != DEFAULT_MODEL:
            return endpoint.model
        return self._facts.get(endpoint.url, EndpointFacts()).model or DEFAULT_MODEL

    def _answer_source(self) -> str:
        """What answers are kept under: the model that gives them, what its reasoning may cost, how they are begun."""
        endpoint, model = self.settings.endpoint, self.model
        named = endpoint.model != DEFAULT_MODEL  # then the name says what it is, wherever it lies
        weights = None if named else self._facts.get(endpoint.url, EndpointFacts()).weights
        asked = [endpoint.reasoning_tokens, endpoint.answer_prefix, endpoint.prefill, weights]
        return "\x00".join([model, *(str(value) for value in asked if value)])

    @property
    def reasoning(self) -> ReasoningStyle:
        """How the model reasons, as far as its tokenizer is known and made for chats."""
        try:
            return UNKNOWN if self._encoder is None else self._encoder.reasoning
        except EncodingError:
            return UNKNOWN

    def _body(self, calls: list[Call], dialect: Dialect) -> dict[str, Any]:
        endpoint = self.settings.endpoint
        if endpoint.kind == "sglang":
            return sglang_body(calls, self.encoder, endpoint)
        assert not isinstance(calls[0], LikelihoodCall)
        return dialect.adapted(openai_body(calls[0], endpoint))

    def _parse(self, calls: list[Call], response: Any, asked: int) -> tuple[list[Answer], int]:
        """The answers, and how many of their votes or texts the server did not give: those failed, they say nothing."""
        endpoint = self.settings.endpoint
        lost: Counter[str] = Counter()
        if endpoint.kind == "sglang":
            answers, prompt_tokens, generated = sglang_answers(calls, self.encoder, response, lost)
        else:
            assert not isinstance(calls[0], LikelihoodCall)
            answer, prompt_tokens, generated = openai_answer(calls[0], endpoint, response, self.reasoning, lost, asked)
            answers = [answer]
        self.counts["prompt-tokens"] += prompt_tokens
        self.counts["generated-tokens"] += generated
        for reason, count in lost.items():
            name = f"unreadable/{reason}"
            self.counts[name] += count
            if self.counts[name] == count:  # the first of its kind is worth a line
                log.warning("an answer of the judge or rewriter is not used: %s", UNREADABLE[reason])
        return answers, lost["aborted"]


def _only(answers: list[Answer] | None) -> Any:
    """The vote (or text) in the answer to a call for one; None when it failed."""
    return answers[0][0] if answers and isinstance(answers[0], list) else None


def _server(endpoint: Endpoint, replicas: int) -> Server:
    base = endpoint.url.rstrip("/").removesuffix("/v1")  # clients of this protocol are often given the URL with it
    return Server(base, endpoint.api_key(), endpoint.proxy(), _bucket(base, endpoint.requests_per_s / replicas))


@cache
def _bucket(url: str, requests_per_s: float) -> TokenBucket:
    """A server's limit in this process: a leader's judge and its rewriter may ask the same one."""
    return TokenBucket(requests_per_s)


def _batches(calls: dict[bytes, Call]) -> list[list[bytes]]:
    """Keys of calls that may share a native request: same kind, prompt identity and number of samples."""
    alike: dict[Any, list[bytes]] = {}
    for key, call in calls.items():
        alike.setdefault((call.identity, *map(str, call.cache_fields())), []).append(key)
    batches = []
    for keys in alike.values():
        size = GENERATE_BATCH if isinstance(calls[keys[0]], GenerateCall) else PREFILL_BATCH
        batches += [keys[begin : begin + size] for begin in range(0, len(keys), size)]
    return batches
