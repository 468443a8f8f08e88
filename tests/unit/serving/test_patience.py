"""Requests wait as long as others are answered, with a bound, and calls in flight are a total."""

from __future__ import annotations

import asyncio
import math

import pytest
from aiohttp import web
from app_server import AppServer
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.serving.calls_in_flight import share_of_calls
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.http import HttpPool, Request
from megatron_sip.serving.patience import LONGEST_WAIT, longest_wait, waits_until
from megatron_sip.serving.server import RetryPolicy, Server

QUICK = RetryPolicy(attempts=50, first_s=0.01, longest_s=0.02, breaker_first_s=0.01, breaker_longest_s=0.02)
times = st.floats(0.0, 1e6)


@given(ready=times, silence=st.floats(0.001, 1e4), answered=times)
def test_a_request_ends_a_silence_after_the_last_answer_or_its_own_beginning_and_never_later_than_the_bound(
    ready: float, silence: float, answered: float
) -> None:
    deadline = longest_wait(ready, silence)
    until = waits_until(deadline, silence, answered)
    assert until == pytest.approx(min(ready + LONGEST_WAIT * silence, max(ready, answered) + silence))
    assert waits_until(deadline, silence, -math.inf) == pytest.approx(ready + silence)
    assert waits_until(ready, math.inf, answered) == ready


def test_calls_in_flight_are_a_total_by_the_number_of_servers_that_replicas_share() -> None:
    assert share_of_calls(None, servers=1, replicas=1) == 256
    assert share_of_calls(None, servers=10, replicas=1) == 640
    assert share_of_calls(None, servers=128, replicas=16) == 512
    assert share_of_calls(512, servers=128, replicas=16) == 32
    assert share_of_calls(8, servers=1, replicas=16) == 1


def ask() -> Request:
    return Request(None, "/ask", lambda server: b"{}", lambda data: data["ok"])


async def send(pool: HttpPool) -> bool | str:
    try:
        return bool(await pool.send(ask(), longest_wait(asyncio.get_running_loop().time(), pool.silence_s)))
    except RequestError as error:
        return error.kind


async def test_a_slow_server_drops_nothing_however_long_all_of_it_takes() -> None:
    """One request at a time: the last waits for all the others, longer than any may wait for an answer."""

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.12)
        return web.json_response({"ok": True})

    server = await AppServer({"POST /ask": slow}).start()
    async with HttpPool([Server(server.url)], concurrency=1, policy=QUICK, silence_s=1.0) as pool:
        begin = asyncio.get_running_loop().time()
        assert await asyncio.gather(*(send(pool) for _ in range(12))) == [True] * 12
        assert asyncio.get_running_loop().time() - begin > 1.0
        assert not pool.unanswered
    await server.stop()


@pytest.mark.parametrize("how", ["hangs", "is gone"])
async def test_servers_that_answer_nothing_end_all_requests_after_the_silence(how: str) -> None:
    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(600)
        return web.Response()

    server = await AppServer({"POST /ask": hang}).start()
    async with HttpPool([Server(server.url)], concurrency=2, policy=QUICK, silence_s=0.3) as pool:
        if how == "is gone":
            await server.stop()
        async with asyncio.timeout(20):  # each for itself would take 3 s, all in turn 0.3 s as well
            waiting = [asyncio.create_task(send(pool)) for _ in range(10)]
            await asyncio.sleep(0.1)
            assert pool.silent_s() > 0.05
            assert await asyncio.gather(*waiting) == ["deadline"] * 10
        assert pool.unanswered
        assert pool.silent_s() == 0.0
    await server.stop()


async def test_a_server_that_hangs_and_answers_who_asks_for_facts_is_silent() -> None:
    """As an engine does whose model hangs: it still tells its weight version, before each new attempt."""

    async def hang(_: web.Request) -> web.Response:
        await asyncio.sleep(600)
        return web.Response()

    async def info(_: web.Request) -> web.Response:
        return web.json_response({"weight_version": "1"})

    async with (
        AppServer({"POST /ask": hang, "GET /info": info}) as server,
        HttpPool([Server(server.url)], concurrency=2, policy=QUICK, silence_s=0.5) as pool,
    ):

        async def ask_for_facts() -> None:
            while True:
                await pool.call(pool.servers[0], "GET", "/info", timeout_s=5.0)
                assert pool.answered_at == -math.inf

        asking = asyncio.create_task(ask_for_facts())
        assert await send(pool) == "deadline"
        assert pool.unanswered
        assert not asking.done()
        asking.cancel()


async def test_a_server_that_hangs_and_is_started_again_has_the_whole_silence_from_then_on() -> None:
    """From when it ends, and from when it is back: to find that it hangs, to load and to answer each take most of it."""
    hangs = True

    async def ask_once(_: web.Request) -> web.Response:
        await asyncio.sleep(600 if hangs else 0.8)
        return web.json_response({"ok": True})

    server = await AppServer({"POST /ask": ask_once}).start()
    async with HttpPool([Server(server.url)], concurrency=2, policy=QUICK, silence_s=1.6) as pool:
        asked = asyncio.create_task(send(pool))
        for _ in range(2):
            await asyncio.sleep(0.8)
            assert not asked.done()
            await (server.stop() if hangs else server.start())
            hangs = False
        assert await asked is True
        assert not pool.unanswered
    await server.stop()


async def test_an_answer_of_any_kind_shows_that_a_server_is_there() -> None:
    answers = [web.Response(status=400), web.json_response({"ok": True})]

    async def refuse(_: web.Request) -> web.Response:
        return answers.pop(0)

    server = await AppServer({"POST /ask": refuse}).start()
    async with HttpPool([Server(server.url)], concurrency=1, policy=QUICK, silence_s=1.0) as pool:
        await server.stop()
        assert await send(pool) == "deadline"
        assert pool.unanswered
        await server.start()
        assert await send(pool) == "rejected"
        assert not pool.unanswered
    await server.stop()
