"""Replies that are too long, lead elsewhere or show the key: each is a failure of its server, and nothing more."""

from __future__ import annotations

import asyncio
import logging
import pickle
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hostile_replies import CHUNKED, FAILURES, chunks
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import make_group, make_settings
from raw_server import JSON, RawServer, reply_of

from megatron_sip.judge import Endpoint, Judge, SettingsError
from megatron_sip.judge.probe import EndpointError
from megatron_sip.serving.failures import RequestError, retry_after
from megatron_sip.serving.http import HttpPool, Request
from megatron_sip.serving.http_reply import MAX_REPLY_BYTES, key_from_environment, shown_url, url_mistake
from megatron_sip.serving.server import RetryPolicy, Server

KEY = "sk-very-secret-4711"
ONCE = RetryPolicy(attempts=1)
MEGABYTE = b"[" + b"1," * (2**19 - 1) + b"]"


def endless(request: bytes) -> Iterator[bytes]:
    return chunks(MEGABYTE for _ in range(10**6))


def long_reply(request: bytes) -> Iterator[bytes]:
    yield JSON + b"Content-Length: %d\r\n\r\n" % (100 * 2**20)
    yield from (MEGABYTE for _ in range(100))


def bomb(request: bytes) -> Iterator[bytes]:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [squeeze.compress(bytes(2**20)) for _ in range(100)] + [squeeze.flush()]
    return chunks([piece for piece in pieces if piece], CHUNKED + b"Content-Encoding: gzip\r\n")


async def ask(url: str, path: str = "/ask", **changes: Any) -> Any:
    async with HttpPool([Server(url, KEY)], concurrency=4, policy=ONCE, **changes) as pool:
        request = Request(0, path, lambda server: b"{}", lambda data: data)
        return await pool.send(request, asyncio.get_running_loop().time() + 20)


@pytest.mark.parametrize("answer", [endless, long_reply, bomb], ids=["endless", "100 MB", "100 MB in 0.1 MB"])
async def test_a_reply_without_bound_is_read_up_to_the_cap(answer: Callable[[bytes], Iterable[bytes]]) -> None:
    async with RawServer(answer) as server:
        tracemalloc.start()
        try:
            with pytest.raises(RequestError, match="more than 64 MB in one reply") as caught:
                await ask(server.url)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert caught.value.kind == "bad-response"
        assert server.sent < MAX_REPLY_BYTES + 16 * 2**20
        assert most < 2 * MAX_REPLY_BYTES


async def test_a_probe_reads_no_more_than_the_cap() -> None:
    async with RawServer(endless) as server, Judge(make_settings(server.url)) as judge:
        with pytest.raises(EndpointError, match="more than 64 MB"):
            await judge.check(60.0)  # and at once: asking again would not help


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_named_and_not_followed(status: int) -> None:
    async with RawServer(lambda request: [reply_of({"ok": True})]) as other:
        moved = b"HTTP/1.1 %d Moved\r\nLocation: %s/ask\r\nContent-Length: 0\r\n\r\n" % (status, other.url.encode())
        async with RawServer(lambda request: [moved]) as server:
            with pytest.raises(RequestError, match=f"redirects to {other.url}/ask, which is not followed") as caught:
                await ask(server.url)
            async with Judge(make_settings(server.url)) as judge:
                with pytest.raises(EndpointError, match=f"status {status}: redirects to {other.url}/ask"):
                    await judge.check(60.0)
        assert caught.value.kind == "rejected"
        assert other.requests == []


@pytest.mark.parametrize("name", FAILURES)
async def test_no_failure_shows_the_key(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    said: list[Any] = []
    async with RawServer(FAILURES[name]) as server:
        endpoint = Endpoint(server.url, "openai", api_key_env="JUDGE_KEY")
        judge_settings = make_settings(server.url, endpoints=(endpoint,), attempts=2, deadline_s=2.0)
        async with Judge(judge_settings) as judge:
            try:
                await judge.check(0.1)  # happy with any 200
            except EndpointError as error:
                said += [repr(error), *traceback.format_exception(error)]
            judged = await judge.score([make_group(0, [0.4, 0.9])])
            said += [judged, judge.counters(), repr(judge_settings)]
        assert any(KEY.encode() in request for request in server.requests)
    assert judged[0].scores is None
    assert caplog.records  # what was lost was logged at all
    everything = (
        repr(said) + "".join(caplog.handler.format(record) for record in caplog.records) + repr(capfd.readouterr())
    )
    assert KEY not in everything
    assert KEY.encode() not in pickle.dumps(judge_settings)


@pytest.mark.parametrize("key", ["sk-1\n", "sk-1\r", "sk 1", "sk-ü", "\tsk", "", "sk\x7f"])
def test_a_key_that_no_header_can_hold_names_its_variable(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY") as caught:
        key_from_environment("JUDGE_KEY")
    assert not key.strip() or key.strip() not in str(caught.value)
    with pytest.raises(SettingsError, match="JUDGE_KEY"):
        Endpoint("http://a", "openai", api_key_env="JUDGE_KEY").api_key()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host", "starts with http"),
        ("http://user:secret@host:1", "would be logged"),
        ("https://secret@host", "would be logged"),
        ("http://", "HOST:PORT"),
        ("http://host:port", "HOST:PORT"),
        ("http://host/v1?key=secret", r"ends before \?"),
        ("http://host#secret", r"ends before \?"),
        ("http://host:1 ", "no white space"),
    ],
)
def test_a_url_that_cannot_be_used_or_holds_a_password_is_refused(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Endpoint(url)
    assert "secret@" not in str(caught.value)
    assert "user" not in str(caught.value).partition(":")[0]


def test_good_urls_pass() -> None:
    for url in ("http://host:30000", "https://api.example.com/v1", "http://[::1]:80/", "http://10.0.0.1"):
        assert url_mistake(url) is None
        assert shown_url(url) == url
    assert shown_url("http://user:p@ss@host/v1") == "http://***@host/v1"


@given(st.text(max_size=40) | st.floats().map(str))
def test_any_retry_after_is_a_time(value: str) -> None:
    assert retry_after(value) >= 0.0


@given(st.text(max_size=60))
def test_url_checks_never_raise_nor_show_a_password(text: str) -> None:
    for url in (text, "http://" + text):
        assert isinstance(url_mistake(url), str | None)
    assert "s3cret" not in shown_url(f"http://user:s3cret{text}@host/v1")
    assert "s3cret" not in str(url_mistake(f"http://user:s3cret{text}@host/v1"))
