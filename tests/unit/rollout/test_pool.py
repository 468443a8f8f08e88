"""The client pool against in-process fake engines that answer, fail, hang or talk nonsense over real HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from app_server import AppServer
from ports import kept_port

from megatron_sip.rollout.pool import PoolSettings, SGLangPool, counted_as
from megatron_sip.rollout.sampling import Failure, SamplingSettings, read_completions
from megatron_sip.serving.failures import RequestError

FAST = PoolSettings(call_timeout_s=0.5, connect_timeout_s=0.5, backoff_s=0.01, max_backoff_s=0.02, down_s=0.3)
TWO_TOKENS = SamplingSettings(max_new_tokens=2)


def result(ids: Sequence[int], version: str = "v1", finish: str = "length") -> dict[str, Any]:
    return {
        "output_ids": list(ids),
        "meta_info": {
            "finish_reason": {"type": finish},
            "weight_version": version,
            "prompt_tokens": 3,
            "cached_tokens": 1,
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.5 * (i + 1), token, None] for i, token in enumerate(ids)],
        },
    }


def echo(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Continue each prefix with its first token, so that a mixed-up order shows."""
    first = body["input_ids"][0]
    sampling = body["sampling_params"]
    return [result([first] * sampling["max_new_tokens"]) for _ in range(sampling["n"])]


class FakeEngine(AppServer):
    """Answers /generate with `behave(body)`; counts calls and how many were open at once."""

    def __init__(self, behave: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
        routes = {"POST /generate": self.generate, "GET /model_info": self.model_info}
        super().__init__(routes | {"GET /server_info": self.server_info})
        self.behave = behave
        self.calls = self.open = self.most_open = 0
        self.healthy = True
        self.version = "v1"
        self.server_arguments: dict[str, Any] = {}

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            answer = await self.behave(await request.json())
            return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)
        finally:
            self.open -= 1

    async def server_info(self, _: web.Request) -> web.Response:
        return web.json_response(self.server_arguments)

    async def model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version}, status=200 if self.healthy else 503)


async def good(body: dict[str, Any]) -> Any:
    return echo(body)


async def broken(_: dict[str, Any]) -> Any:
    return web.json_response({"error": "out of memory"}, status=500)


async def hanging(_: dict[str, Any]) -> Any:
    await asyncio.sleep(30)


async def refusing(_: dict[str, Any]) -> Any:
    return web.json_response({"error": "prompt too long"}, status=400)


@asynccontextmanager
async def engines(*behaviours: Callable[[dict[str, Any]], Awaitable[Any]]) -> AsyncIterator[list[FakeEngine]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeEngine(behave)) for behave in behaviours]


async def test_results_keep_the_order_of_the_input() -> None:
    async def late_first(body: dict[str, Any]) -> Any:
        await asyncio.sleep(0.1 / body["input_ids"][0])
        return echo(body)

    async with engines(late_first, late_first) as fakes, SGLangPool([fake.url for fake in fakes], FAST) as pool:
        settings = SamplingSettings(max_new_tokens=2, n=3)
        results = await pool.generate([[i, 7, 7] for i in range(1, 9)], settings)
    assert [[c.ids for c in completions] for completions in results] == [[[i, i]] * 3 for i in range(1, 9)]
    assert results[0][0].logprobs == [-0.5, -1.0]
    assert pool.counters.calls == 8
    assert pool.counters.completion_tokens == 8 * 3 * 2
    assert pool.counters.cached_tokens == 8 * 3


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [(broken, "http-5xx"), (hanging, "timeout"), (refusing, "http-4xx")],
    ids=["500", "hangs", "400"],
)
async def test_a_prefix_that_cannot_be_had_is_a_counted_failure(behaviour: Any, kind: str) -> None:
    patience = 0.2 if behaviour is hanging else 30.0
    settings = PoolSettings(call_timeout_s=patience, backoff_s=0.01, max_backoff_s=0.02, down_s=0.05, attempts=2)
    async with engines(behaviour) as (fake,), SGLangPool([fake.url], settings) as pool:
        results = await pool.generate([[1], [2]], TWO_TOKENS)
    assert [r.kind for r in results] == [kind, kind]
    assert fake.url in results[0].reason
    assert pool.counters.failures == {kind: 2}
    assert fake.calls == (2 if kind == "http-4xx" else 4)  # the request's own fault is not retried


@pytest.mark.parametrize("behaviour", [broken, hanging], ids=["500", "hangs"])
async def test_retry_lands_on_the_other_engine(behaviour: Any) -> None:
    async with engines(behaviour, good) as (bad, fine), SGLangPool([bad.url, fine.url], FAST) as pool:
        results = await pool.generate([[i] for i in range(1, 5)], TWO_TOKENS)
    assert [r[0].ids for r in results] == [[i, i] for i in range(1, 5)]
    assert bad.calls >= 1
    assert fine.calls == 4
    assert pool.counters.retries == bad.calls == sum(pool.counters.attempt_failures.values())
    assert not pool.counters.failures


async def test_an_engine_that_recovers_is_used_again_after_a_health_probe() -> None:
    down = True

    async def flaky(body: dict[str, Any]) -> Any:
        return await (broken(body) if down else good(body))

    settings = PoolSettings(backoff_s=0.01, max_backoff_s=0.02, down_s=0.1)
    async with engines(flaky, good) as (sick, fine), SGLangPool([sick.url, fine.url], settings) as pool:
        await pool.generate([[1]], TWO_TOKENS)
        assert sick.calls == 1
        sick.healthy = down = False
        await asyncio.sleep(0.15)
        await pool.generate([[1], [2], [3]], TWO_TOKENS)  # starts a probe, which says no
        assert sick.calls == 1
        sick.healthy = True
        async with asyncio.timeout(30):
            while sick.calls < 2:  # a probe must have said yes before
                await asyncio.sleep(0.15)
                await pool.generate([[i] for i in range(1, 5)], TWO_TOKENS)


async def test_a_success_from_before_a_failure_does_not_bring_an_engine_back() -> None:
    """It was asked before; only the engine's own word about its weights says that it can be used again."""

    async def ends_well_after_a_failure(body: dict[str, Any]) -> Any:
        if body["input_ids"] == [2]:
            return await broken(body)
        await asyncio.sleep(0.2)
        return echo(body)

    settings = PoolSettings(backoff_s=0.01, max_backoff_s=0.02, down_s=0.05)
    async with engines(ends_well_after_a_failure, good) as (sick, fine):
        sick.healthy = False
        async with SGLangPool([sick.url, fine.url], settings) as pool:
            await pool.generate([[1], [3], [2]], TWO_TOKENS)  # to the sick, the fine and the sick one
            assert sick.calls == 2
            await pool.generate([[1], [3], [4], [5]], TWO_TOKENS)
    assert sick.calls == 2


async def test_a_request_s_own_deadline_does_not_close_an_engine() -> None:
    settings = PoolSettings(call_timeout_s=30.0, deadline_s=0.3)
    async with engines(hanging) as (fake,), SGLangPool([fake.url], settings) as pool:
        fake.healthy = False  # a check would leave it out
        assert isinstance((await pool.generate([[1]], TWO_TOKENS))[0], Failure)
        fake.behave = good
        ((completion,),) = await pool.generate([[1]], TWO_TOKENS)
    assert completion.ids == [1, 1]


async def test_an_engine_whose_port_is_closed_is_a_connection_failure() -> None:
    url = f"http://127.0.0.1:{kept_port()}"
    settings = PoolSettings(attempts=2, backoff_s=0.01, max_backoff_s=0.02, down_s=0.05, deadline_s=0.5)
    async with SGLangPool([url], settings) as pool:
        (lost,) = await pool.generate([[1]], TWO_TOKENS)
        started = time.monotonic()
        with pytest.raises(RequestError, match=f"{url}.*Check that the server is running"):
            await pool.wait_ready(timeout_s=1.0)
    assert isinstance(lost, Failure)
    assert lost.kind == "deadline"
    assert "connection" in pool.counters.attempt_failures or "Connect" in lost.reason
    assert time.monotonic() - started < 20.0


async def test_the_deadline_bounds_a_request_with_all_its_retries() -> None:
    settings = PoolSettings(call_timeout_s=30.0, deadline_s=0.3)
    async with engines(hanging) as (fake,), SGLangPool([fake.url], settings) as pool:
        started = time.monotonic()
        (lost,) = await pool.generate([[1]], TWO_TOKENS)
    assert isinstance(lost, Failure)
    assert lost.kind == "deadline"
    assert time.monotonic() - started < 20.0


async def test_concurrency_never_exceeds_its_bound() -> None:
    async def slow(body: dict[str, Any]) -> Any:
        await asyncio.sleep(0.02)
        return echo(body)

    settings = PoolSettings(max_concurrency=3)
    async with engines(slow, slow) as fakes, SGLangPool([fake.url for fake in fakes], settings) as pool:
        await pool.generate([[i] for i in range(1, 31)], TWO_TOKENS)
    assert [fake.most_open for fake in fakes] == [3, 3]


async def test_completions_by_other_weights_are_refused() -> None:
    async def old(_: dict[str, Any]) -> Any:
        return [result([1, 1], version="v0")]

    async with engines(old, good) as (stale, fresh), SGLangPool([stale.url, fresh.url], FAST) as pool:
        (completions,) = await pool.generate([[1]], TWO_TOKENS, weight_version="v1")
        assert completions[0].weight_version == "v1"
    assert pool.counters.attempt_failures == {"stale-weights": 1}


async def test_an_engine_that_missed_a_push_gets_no_request_until_it_has_caught_up() -> None:
    """It may be paused, and a request to it would take the whole call's time."""

    def serving(index: int) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        async def behave(_: dict[str, Any]) -> Any:
            return [result([1, 1], version=fakes[index].version)]

        return behave

    settings = PoolSettings(backoff_s=0.01, max_backoff_s=0.02, down_s=0.1)
    prefixes = [[i] for i in range(1, 9)]
    async with engines(serving(0), serving(1)) as fakes, SGLangPool([fake.url for fake in fakes], settings) as pool:
        await pool.generate(prefixes, TWO_TOKENS, weight_version="v1")
        assert [fake.calls for fake in fakes] == [4, 4]
        fakes[1].version = "v2"
        for _ in range(2):
            await pool.generate(prefixes, TWO_TOKENS, weight_version="v2")
            await asyncio.sleep(0.15)  # its health is asked for meanwhile, and is good
        assert [fake.calls for fake in fakes] == [4, 20]
        fakes[0].version = fakes[1].version = "v3"
        results = await pool.generate(prefixes, TWO_TOKENS, weight_version="v3")
        assert [fake.calls for fake in fakes] == [8, 24]
    assert {completions[0].weight_version for completions in results} == {"v3"}
    assert not pool.counters.attempt_failures


async def test_an_engine_that_restarts_between_pushes_is_left_out_until_the_next() -> None:
    async def restarted(_: dict[str, Any]) -> Any:
        fakes[0].version = "default"
        return [result([1, 1], version="default")]

    settings = PoolSettings(backoff_s=0.01, max_backoff_s=0.02, down_s=0.05)
    async with engines(restarted, good) as fakes, SGLangPool([fake.url for fake in fakes], settings) as pool:
        for _ in range(3):
            ((one,),) = await pool.generate([[1]], TWO_TOKENS, weight_version="v1")
            assert one.weight_version == "v1"
            await asyncio.sleep(0.1)
    assert fakes[0].calls == 1


async def test_when_no_engine_has_the_weights_requests_fail_at_once() -> None:
    async with engines(good, good) as fakes, SGLangPool([fake.url for fake in fakes], FAST) as pool:
        started = time.monotonic()
        (lost,) = await pool.generate([[1]], TWO_TOKENS, weight_version="v9")
    assert isinstance(lost, Failure)
    assert lost.kind == "stale-weights"
    assert lost.reason.count("has weights 'v1', not 'v9'") == 2
    assert time.monotonic() - started < 20.0
    assert [fake.calls for fake in fakes] == [0, 0]


async def test_weights_that_changed_during_a_generation_are_refused() -> None:
    mixed = result([1, 1])
    mixed["meta_info"]["weight_versions"] = [{"version": "v0", "start": 0}, {"version": "v1", "start": 1}]

    async def behave(_: dict[str, Any]) -> Any:
        return [mixed]

    settings = PoolSettings(attempts=1)
    async with engines(behave) as (fake,), SGLangPool([fake.url], settings) as pool:
        (lost,) = await pool.generate([[1]], TWO_TOKENS, weight_version="v1")
    assert isinstance(lost, Failure)
    assert lost.kind == "stale-weights"


NONSENSE: dict[str, tuple[Any, str]] = {
    "text": ("certainly!", "no meta_info"),
    "too few": ([], "0 results instead of 1"),
    "no ids": ([{"meta_info": {"finish_reason": {"type": "length"}}}], "without output_ids"),
    "short": ([result([5])], "1 tokens and finish reason length"),
    "long": ([result([5, 5, 5])], "3 tokens"),
    "abort": ([result([5], finish="abort")], "aborted"),
    "finish": ([result([5, 5], finish="tired")], "finish reason 'tired'"),
}


def with_logprobs(entries: Any) -> list[dict[str, Any]]:
    reply = result([5, 6])
    reply["meta_info"]["output_token_logprobs"] = entries
    return [reply]


NONSENSE |= {
    "no logprobs": (with_logprobs(None), "no log-probs for 2 tokens"),
    "fewer logprobs": (with_logprobs([[-1.0, 5, None]]), "1 log-probs for 2 tokens"),
    "other tokens": (with_logprobs([[-1.0, 5, None], [-1.0, 7, None]]), "other tokens"),
    "null logprob": (with_logprobs([[-1.0, 5, None], [None, 6, None]]), "not a finite number"),
    "positive logprob": (with_logprobs([[-1.0, 5, None], [5, 6, None]]), "not a finite number of at most 0"),
    "worded logprob": (with_logprobs([[-1.0, 5, None], ["nan", 6, None]]), "not a finite number"),
    "true logprob": (with_logprobs([[-1.0, 5, None], [False, 6, None]]), "not a finite number"),
    "id in words": ([result(["5", 6])], "no token ids"),
    "id below 0": ([result([5, -1])], "no token ids"),
    "fraction of an id": ([result([5, 6.5])], "no token ids"),
    "id above all": ([result([5, 2**70])], "no token ids below 100"),
    "id outside": ([result([5, 100])], "no token ids below 100"),
    "versions": ([{**result([5, 6]), "meta_info": {**result([5, 6])["meta_info"], "weight_versions": 7}}], "TypeError"),
    "counts": ([{**result([5, 6]), "meta_info": {**result([5, 6])["meta_info"], "prompt_tokens": "7x"}}], "ValueError"),
    "garbled": (with_logprobs([[-1.0], [-1.0]]), "IndexError"),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_is_a_failure_and_never_a_completion(name: str) -> None:
    reply, message = NONSENSE[name]

    async def behave(_: dict[str, Any]) -> Any:
        return reply

    settings = PoolSettings(attempts=1, vocab_size=100)
    async with engines(behave) as (fake,), SGLangPool([fake.url], settings) as pool:
        (lost,) = await pool.generate([[1]], TWO_TOKENS)
    assert isinstance(lost, Failure)
    assert lost.kind == ("aborted" if name == "abort" else "bad-response")
    assert message in lost.reason


async def test_logprobs_are_those_of_the_continuation_and_of_nothing_else() -> None:
    """Asked for from the prefix's last token on; an answer about other tokens, or without one, is a failure."""

    async def answer(body: dict[str, Any]) -> Any:
        [ids], [start] = body["input_ids"], body["logprob_start_len"]
        entries = [[None if place == start else -0.5 * place, token, None] for place, token in enumerate(ids)][start:]
        return [{"meta_info": {"input_token_logprobs": entries}}]

    async def other(body: dict[str, Any]) -> Any:
        return [{"meta_info": {"input_token_logprobs": [[None, 1, None], [-1.0, 4, None]]}}]

    async with engines(answer) as (fake,), SGLangPool([fake.url], FAST) as pool:
        assert await pool.logprobs([[1, 2, 3], [4]], [[5, 6], [7]]) == [[-1.5, -2.0], [-0.5]]
        with pytest.raises(ValueError, match="at least one token"):
            await pool.logprobs([[1]], [[]])
    async with engines(other) as (fake,), SGLangPool([fake.url], FAST) as pool:
        [lost] = await pool.logprobs([[1]], [[5]])
    assert isinstance(lost, Failure)
    assert "other tokens" in lost.reason


def test_a_completion_that_ends_early_keeps_its_eos_token() -> None:
    reply = [result([9, 2], finish="stop")]
    [completion], _ = read_completions(reply, SamplingSettings(max_new_tokens=8), None, None)
    assert completion.ids == [9, 2]
    assert len(completion.logprobs) == 2
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingSettings(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda: SamplingSettings(max_new_tokens=1, n=0), "n must be at least 1"),
        (lambda: SamplingSettings(max_new_tokens=1, temperature=-1), "temperature must not be negative"),
        (lambda: SamplingSettings(max_new_tokens=1, top_p=0), r"top_p must be in \(0, 1\]"),
        (lambda: SGLangPool([]), "at least one engine URL"),
        (lambda: SGLangPool(["localhost:30000"]), "localhost:30000: a URL starts with http"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


async def test_an_empty_prefix_is_refused() -> None:
    async with SGLangPool(["http://127.0.0.1:1"]) as pool:
        with pytest.raises(ValueError, match="empty prefix"):
            await pool.generate([[1], []], TWO_TOKENS)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (RequestError("server-error", "x", status=503), "http-5xx"),
        (RequestError("rejected", "x", status=404), "http-4xx"),
        (RequestError("rate-limited", "x", status=429), "http-4xx"),
        (RequestError("rejected", "x", status=307), "http-3xx"),
        (RequestError("disconnected", "x"), "connection"),
        *((RequestError(kind, "x"), kind) for kind in ("timeout", "deadline", "connection", "bad-response")),
        *((RequestError(kind, "x"), kind) for kind in ("aborted", "stale-weights")),
    ],
    ids=str,
)
def test_failures_keep_the_names_that_the_metrics_of_earlier_runs_have(error: RequestError, name: str) -> None:
    assert counted_as(error) == name


async def deterministic(body: dict[str, Any]) -> Any:
    """As SGLang with --enable-deterministic-inference: what is drawn is a function of prompt and seed (42 without one)."""
    if isinstance(body["sampling_params"], dict):
        sampling = body["sampling_params"]
        return [result([body["input_ids"][0], sampling.get("sampling_seed", 42) % 1000])] * sampling["n"]
    asked = zip(body["input_ids"], body["sampling_params"], strict=True)
    return [result([prefix[0], sampling["sampling_seed"] % 1000]) for prefix, sampling in asked]


async def test_seeded_completions_differ_among_each_other_and_are_the_same_again() -> None:
    settings = SamplingSettings(max_new_tokens=2, n=4)
    async with engines(deterministic) as (fake,), SGLangPool([fake.url], FAST) as pool:
        first = await pool.generate([[1], [2]], settings, seeds=[7, 8])
        again = await pool.generate([[2]], settings, seeds=[8])
        one = await pool.generate([[2]], SamplingSettings(max_new_tokens=2), seeds=[8])
    assert not any(isinstance(found, Failure) for found in (*first, *again, *one))
    assert all(len({tuple(completion.ids) for completion in found}) == 4 for found in first)  # type: ignore[union-attr]
    assert again == first[1:]
    assert one[0] == first[1][:1]  # type: ignore[index]


@pytest.mark.parametrize(("answers", "expected"), [((True, True), True), ((True, False), False), ((None, True), False)])
async def test_seeds_are_for_pools_whose_engines_all_take_them(
    answers: tuple[bool | None, ...], expected: bool
) -> None:
    async with engines(good, good) as fakes, SGLangPool([fake.url for fake in fakes], FAST) as pool:
        for fake, answer in zip(fakes, answers, strict=True):
            fake.server_arguments = {} if answer is None else {"enable_deterministic_inference": answer}
        assert await pool.take_seeds() is expected
