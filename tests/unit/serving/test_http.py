"""The HTTP pool: routing, back-off, breaker, rate limit, deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from app_server import AppServer
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.serving.failures import BadResponseError, RequestError, retry_after
from megatron_sip.serving.http import HttpPool, Request, dealt
from megatron_sip.serving.server import RetryPolicy, Server, TokenBucket

QUICK = RetryPolicy(attempts=4, first_s=0.01, longest_s=0.05, breaker_failures=3, breaker_first_s=0.2)


class Loopback(AppServer):
    """A server whose handler the test gives; keeps the arrival times."""

    def __init__(self, handler: Callable[[int], web.Response | float]) -> None:
        super().__init__({"POST /ask": self._ask})
        self._handler = handler
        self.arrivals: list[float] = []
        self.affinities: list[Any] = []

    async def _ask(self, request: web.Request) -> web.Response:
        self.affinities.append(await request.json())
        self.arrivals.append(time.monotonic())
        result = self._handler(len(self.arrivals) - 1)
        if isinstance(result, float):
            await asyncio.sleep(result)
            return web.json_response({"ok": True})
        return result


def fine(index: int) -> web.Response:
    return web.json_response({"ok": True})


def ask(affinity: int = 0, parse: Callable[[Any], Any] = lambda data: data["ok"]) -> Request:
    return Request(affinity, "/ask", lambda server: str(affinity).encode(), parse)


async def send(pool: HttpPool, request: Request, within: float = 5.0) -> Any:
    return await pool.send(request, asyncio.get_running_loop().time() + within)


async def test_retry_after_is_honoured() -> None:
    def handler(index: int) -> web.Response:
        return fine(index) if index else web.Response(status=429, headers={"Retry-After": "0.4"})

    async with Loopback(handler) as server, HttpPool([Server(server.url)], concurrency=4, policy=QUICK) as pool:
        assert await send(pool, ask()) is True
        assert server.arrivals[1] - server.arrivals[0] >= 0.4
        assert pool.counts["failed-attempts/rate-limited"] == pool.counts["retries"] == 1


def limited(seconds: str) -> Callable[[int], web.Response]:
    return lambda index: web.Response(status=429, headers={"Retry-After": seconds})


async def test_a_server_that_asks_for_time_gets_it_while_another_does_the_work() -> None:
    async with Loopback(limited("60")) as busy, Loopback(fine) as idle:
        async with HttpPool([Server(busy.url), Server(idle.url)], concurrency=4, policy=QUICK) as pool:
            begin = time.monotonic()
            results = await asyncio.gather(*(send(pool, ask(affinity), within=40.0) for affinity in range(24)))
            assert time.monotonic() - begin < 30.0
        assert results == [True] * 24
        assert len(busy.arrivals) <= 4  # those in flight before the first answer
        assert len(idle.arrivals) == 24
        assert "breaker-opened" not in pool.counts


async def test_when_all_servers_ask_for_time_the_reason_is_the_rate_limit() -> None:
    async with Loopback(limited("60")) as first, Loopback(limited("30")) as second:
        async with HttpPool([Server(first.url), Server(second.url)], concurrency=4, policy=QUICK) as pool:
            begin = time.monotonic()
            results = await asyncio.gather(
                *(send(pool, ask(affinity), within=5.0) for affinity in range(12)), return_exceptions=True
            )
            assert time.monotonic() - begin < 20.0
        assert [error.kind for error in results if isinstance(error, RequestError)] == ["rate-limited"] * 12
        assert len(first.arrivals) + len(second.arrivals) <= 8


async def test_all_servers_that_ask_for_time_are_asked_after_it_one_request_first() -> None:
    def handler(index: int) -> web.Response:
        return limited("0.3")(index) if index < 8 else fine(index)

    async with Loopback(handler) as server, HttpPool([Server(server.url)], concurrency=4, policy=QUICK) as pool:
        results = await asyncio.gather(*(send(pool, ask(affinity)) for affinity in range(12)))
        assert results == [True] * 12  # also those that were turned away more often than there are attempts
        gaps = [b - a for a, b in zip(server.arrivals[3:8], server.arrivals[4:9], strict=True)]
        assert min(gaps) >= 0.29


async def test_a_full_pool_does_not_outlive_the_deadline() -> None:
    async with Loopback(lambda index: 30.0) as server, HttpPool([Server(server.url)], concurrency=1) as pool:
        long = asyncio.create_task(send(pool, ask(), within=30.0))
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        with pytest.raises(RequestError, match="deadline"):
            await send(pool, ask(1), within=0.2)
        assert time.monotonic() - begin < 20.0
        long.cancel()


@pytest.mark.parametrize("error", [OverflowError, RecursionError, AssertionError, ValueError, KeyError, MemoryError])
async def test_what_a_parser_raises_is_a_bad_response(error: type[Exception]) -> None:
    def parse(data: Any) -> Any:
        raise error("x")

    async with (
        Loopback(lambda index: fine(index)) as server,
        HttpPool([Server(server.url)], concurrency=1, policy=QUICK) as pool,
    ):
        with pytest.raises(RequestError) as caught:
            await send(pool, ask(parse=parse))
    assert caught.value.kind == "bad-response"


@pytest.mark.parametrize(
    ("status", "requests", "kind"), [(500, 4, "server-error"), (503, 4, "server-error"), (400, 1, "rejected")]
)
async def test_what_is_tried_again(status: int, requests: int, kind: str) -> None:
    policy = RetryPolicy(attempts=4, first_s=0.01, longest_s=0.02, breaker_failures=100)
    async with (
        Loopback(lambda index: web.Response(status=status, text="why")) as server,
        HttpPool([Server(server.url)], concurrency=4, policy=policy) as pool,
    ):
        with pytest.raises(RequestError, match=f"status {status}: why") as caught:
            await send(pool, ask())
        assert caught.value.kind == kind
        assert len(server.arrivals) == requests


async def test_an_unreadable_response_is_tried_again() -> None:
    def parse(data: Any) -> Any:
        if data["ok"] is not True:
            raise BadResponseError("not ok")
        return data["ok"]

    replies = [web.Response(text="no json"), web.json_response({"ok": 1}), web.json_response({"ok": True})]
    async with (
        Loopback(replies.__getitem__) as server,
        HttpPool([Server(server.url)], concurrency=1, policy=QUICK) as pool,
    ):
        assert await send(pool, ask(parse=parse)) is True
        assert pool.counts["failed-attempts/bad-response"] == 2


async def test_a_slow_answer_is_cut_off_and_asked_again() -> None:
    async with (
        Loopback(lambda index: 30.0 if index == 0 else fine(index)) as server,
        HttpPool([Server(server.url)], concurrency=1, policy=QUICK, call_timeout_s=1.0) as pool,
    ):
        assert await send(pool, ask()) is True
        assert pool.counts["failed-attempts/timeout"] == 1


async def test_nothing_outlives_the_deadline() -> None:
    async with Loopback(lambda index: 30.0) as server, HttpPool([Server(server.url)], concurrency=1) as pool:
        begin = time.monotonic()
        results = await asyncio.gather(*(send(pool, ask(), within=0.5) for _ in range(5)), return_exceptions=True)
        assert time.monotonic() - begin < 20.0
        assert [result.kind for result in results if isinstance(result, RequestError)] == ["deadline"] * 5


async def test_requests_of_a_prompt_go_to_one_server_and_prompts_spread() -> None:
    async with Loopback(fine) as a, Loopback(fine) as b, Loopback(fine) as c:
        async with HttpPool([Server(s.url) for s in (a, b, c)], concurrency=16) as pool:
            await asyncio.gather(*(send(pool, ask(affinity)) for affinity in range(60) for _ in range(3)))
        homes = [Counter(server.affinities) for server in (a, b, c)]
        assert all(count == 3 for home in homes for count in home.values())
        assert [len(home) for home in homes] == [20, 20, 20]


async def test_prompts_of_a_dead_server_are_dealt_to_the_others_and_come_back() -> None:
    broken = [False]

    def handler(index: int) -> web.Response:
        return web.Response(status=500) if broken[0] else fine(index)

    policy = replace(QUICK, breaker_failures=1, breaker_first_s=0.3, breaker_longest_s=0.3)
    async with Loopback(handler) as mortal, Loopback(fine) as a, Loopback(fine) as b, Loopback(fine) as c:
        servers = [mortal, a, b, c]
        async with HttpPool([Server(server.url) for server in servers], concurrency=16, policy=policy) as pool:

            async def homes() -> list[set[int]]:
                for server in servers:
                    server.affinities.clear()
                await asyncio.gather(*(send(pool, ask(prompt)) for prompt in range(48) for _ in range(2)))
                return [set(server.affinities) for server in servers]

            own = await homes()
            broken[0] = True
            with pytest.raises(RequestError):
                await pool.call(pool.servers[0], "POST", "/ask", 0, timeout_s=5.0)
            assert await send(pool, ask(0)) is True  # opens the breaker
            dead = await homes()
            broken[0] = False
            await asyncio.sleep(0.5)
            assert await send(pool, ask(0)) is True  # the probe
            back = await homes()
    assert own == back == [set(range(place, 48, 4)) for place in range(4)]
    assert [len(home) for home in dead[1:]] == [16, 16, 16]


@given(st.integers(1, 40), st.data())
def test_shares_differ_by_two_prompts_at_most_whatever_servers_are_ready(count: int, data: st.DataObject) -> None:
    ready = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    first, prompts = data.draw(st.integers(0, 10_000)), data.draw(st.integers(1, 300))
    places = [dealt(number, ready, count) for number in range(first, first + prompts)]
    loads = [places.count(place) for place in ready]
    assert sum(loads) == prompts
    assert max(loads) - min(loads) <= (1 if len(ready) == count else 2)
    assert all(
        place == number % count
        for number, place in zip(range(first, first + prompts), places, strict=True)
        if number % count in ready
    )


def test_256_prompts_fill_32_servers_with_eight_each_and_a_lost_node_s_prompts_the_other_24() -> None:
    assert Counter(dealt(number, range(32), 32) for number in range(256)) == Counter(dict.fromkeys(range(32), 8))
    loads = Counter(dealt(number, range(8, 32), 32) for number in range(256)).values()
    assert (len(loads), max(loads), min(loads)) == (24, 11, 10)  # the mean is 10.7


async def test_a_failing_server_is_left_alone_and_probed_later() -> None:
    broken = [True]

    def handler(index: int) -> web.Response:
        return web.Response(status=500) if broken[0] else fine(index)

    async with (
        Loopback(handler) as bad,
        Loopback(fine) as good,
        HttpPool([Server(bad.url), Server(good.url)], concurrency=4, policy=QUICK) as pool,
    ):
        for affinity in range(40):
            assert await send(pool, ask(affinity)) is True
        assert len(bad.arrivals) <= 8
        assert pool.counts["breaker-opened"] >= 1
        broken[0] = False
        await asyncio.sleep(1.0)
        before = len(bad.arrivals)
        for affinity in range(40):
            assert await send(pool, ask(affinity)) is True
        assert len(bad.arrivals) - before >= 8


async def test_without_affinity_the_server_with_the_fewest_requests_gets_the_next() -> None:
    def slow(index: int) -> float:
        return 0.05

    async with (
        Loopback(slow) as first,
        Loopback(slow) as second,
        HttpPool([Server(first.url), Server(second.url)], concurrency=16) as pool,
    ):
        anywhere = replace(ask(), affinity=None)
        await asyncio.gather(*(send(pool, anywhere) for _ in range(7)))
        assert [len(server.arrivals) for server in (first, second)] == [4, 3]
        assert [(server.in_flight, server.calls) for server in pool.servers] == [(0, 4), (0, 3)]


async def test_a_check_decides_whether_a_server_that_failed_is_asked_again() -> None:
    broken, refusals = [True], [0]

    async def check(server: Server) -> None:
        refusals[0] += broken[0]
        if broken[0]:
            raise RequestError("connection", server.url)

    def handler(index: int) -> web.Response:
        return web.Response(status=500) if broken[0] else fine(index)

    policy = RetryPolicy(first_s=0.01, longest_s=0.02, breaker_failures=1, breaker_first_s=0.05, breaker_longest_s=0.05)
    async with (
        Loopback(handler) as server,
        HttpPool([Server(server.url)], concurrency=4, policy=policy, check=check) as pool,
    ):
        waiting = asyncio.create_task(send(pool, ask(), within=30.0))
        while refusals[0] < 3:
            await asyncio.sleep(0.01)
        assert len(server.arrivals) == 1
        broken[0] = False
        assert await waiting is True
        assert len(server.arrivals) == 2


async def test_work_in_flight_is_bounded() -> None:
    running, most = 0, 0

    async def slow(request: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return web.json_response({"ok": True})

    async with (
        AppServer({"POST /ask": slow}) as server,
        HttpPool([Server(server.url)], concurrency=7) as pool,
    ):
        await asyncio.gather(*(send(pool, ask()) for _ in range(60)))
    assert most == 7


async def test_a_server_that_takes_no_connection_any_more_costs_no_more_than_its_own_time_out() -> None:
    """As a node that has vanished: nothing answers its SYN. What it was asked the other one answers."""
    with socket.socket() as gone, contextlib.ExitStack() as waiting:
        gone.bind(("127.0.0.1", 0))
        gone.listen(0)
        for _ in range(4):  # which fill its backlog
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(gone.getsockname())
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
        async with Loopback(fine) as server:
            servers = [Server(url), Server(server.url)]
            async with HttpPool(servers, concurrency=9, connect_timeout_s=0.2, call_timeout_s=60.0) as pool:
                begin = time.monotonic()
                await asyncio.gather(*(send(pool, ask()) for _ in range(8)))
                assert time.monotonic() - begin < 20.0
                assert pool.counts["failed-attempts/connection"] > 0
                assert pool.counts["failed-attempts/timeout"] == 0


async def test_the_rate_limit_holds() -> None:
    async with Loopback(fine) as server:
        async with HttpPool([Server(server.url, bucket=TokenBucket(20))], concurrency=50) as pool:
            begin = time.monotonic()
            await asyncio.gather(*(send(pool, ask()) for _ in range(40)))
        assert time.monotonic() - begin >= 0.9  # 20 at once, 20 more in the following second


@given(st.lists(st.floats(0, 2), min_size=1, max_size=60), st.floats(0.5, 20))
def test_the_token_bucket_never_lets_more_through_than_rate_and_burst(gaps: list[float], rate: float) -> None:
    bucket, now, passed = TokenBucket(rate), 1.0, []
    for gap in gaps:
        now += gap
        if bucket.wait_s(now) == 0.0:
            passed.append(now)
    for begin in range(len(passed)):
        for end in range(begin, len(passed)):
            assert end - begin + 1 <= max(1.0, rate) + rate * (passed[end] - passed[begin]) + 1e-6


def test_retry_after_in_its_two_forms() -> None:
    assert retry_after("7") == 7.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after("Fri, 31 Dec 9999 23:59:59 GMT") > 3000
    assert retry_after(None) == retry_after("soon") == 0.0
