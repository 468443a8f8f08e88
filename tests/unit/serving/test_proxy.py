"""Hosted judges are reached through the proxy of the environment; everything on the cluster directly."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest
from fake_judge import FakeJudge, reply, truthful_answer
from judge_cases import make_group, make_settings
from ports import kept_port
from raw_server import RawServer, reply_of

from megatron_sip.judge import Endpoint, Judge, SettingsError
from megatron_sip.judge.probe import EndpointError
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.proxy import DIRECT, Proxy, is_public, proxy_for


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
async def test_a_hosted_judge_is_asked_through_the_proxy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: bytes) -> Iterator[bytes]:
        prompt = request.decode().replace("\\n", "\n")
        yield reply_of({"data": []} if request.startswith(b"GET") else reply(truthful_answer(prompt), {}))

    async with RawServer(answer) as proxy:
        monkeypatch.setenv(name, proxy.url.replace("http://", "http://me:p%40ss@"))
        monkeypatch.setenv("JUDGE_KEY", "sk-4711")
        endpoint = Endpoint("http://judge.example.com/v1", "openai", api_key_env="JUDGE_KEY")
        async with Judge(make_settings("http://a", endpoints=(endpoint,))) as judge:
            await judge.check(5.0)
            [judged] = await judge.score([make_group(0, [0.4, 0.9])])
    assert judged.scores == [0.0, 1.0]
    assert proxy.requests[0].startswith(b"GET http://judge.example.com/v1/models HTTP/1.1")
    assert proxy.requests[1].startswith(b"POST http://judge.example.com/v1/chat/completions HTTP/1.1")
    user = base64.b64encode(b"me:p@ss")
    assert all(b"Basic " + user in request and b"Bearer sk-4711" in request for request in proxy.requests)


async def test_a_tunnel_is_asked_for_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(lambda request: [b"HTTP/1.1 403 No\r\n\r\n"]) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.replace("http://", "http://me:secret@"))
        monkeypatch.setenv("JUDGE_KEY", "sk-4711")
        endpoint = Endpoint("https://judge.example.com", "openai", api_key_env="JUDGE_KEY")
        async with Judge(make_settings("http://a", endpoints=(endpoint,), attempts=1)) as judge:
            with pytest.raises(EndpointError):
                await judge.check(0.1)
            [judged] = await judge.score([make_group(0, [0.4, 0.9])])
    assert judged.scores is None
    assert proxy.requests[0].startswith(b"CONNECT judge.example.com:443 HTTP/1.1")
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"me:secret") in proxy.requests[0]
    assert all(b"sk-4711" not in request for request in proxy.requests)


async def test_what_is_on_the_cluster_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    async with RawServer(lambda request: [b"HTTP/1.1 502 Proxy\r\n\r\n"]) as proxy, FakeJudge() as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        async with Judge(make_settings(server.url)) as judge:
            await judge.check(5.0)
            [judged] = await judge.score([make_group(0, [0.4, 0.9])])
        assert judged.scores == [0.0, 1.0]
        assert proxy.requests == []


def test_blocking_calls_of_engines_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_engine import FakeEngine

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{kept_port()}")
    with FakeEngine() as engine:
        assert call(engine.url, "GET", "/model_info", timeout_s=5.0)["weight_version"] == "default"


def test_no_proxy_and_the_cluster_come_before_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("https_proxy", "proxy:3129")
    assert proxy_for("http://api.example.com") == Proxy("http://proxy:3128")
    assert proxy_for("https://api.example.com/v1") == Proxy("http://proxy:3129")
    assert proxy_for("https://8.8.8.8") == Proxy("http://proxy:3129")
    for host in ("judge-0", "localhost", "127.0.0.1", "10.0.0.7", "192.168.1.2", "[::1]", "node1.local"):
        assert proxy_for(f"http://{host}:30000") == DIRECT
        assert proxy_for(f"https://{host}") == DIRECT
    monkeypatch.setenv("no_proxy", "example.org,.example.com:8000")
    assert proxy_for("http://judge.example.org:1") == DIRECT
    assert proxy_for("http://judge.example.com:8000") == DIRECT
    assert proxy_for("http://judge.example.com:8001") != DIRECT
    assert Endpoint("http://judge.example.com", "openai").proxy() != DIRECT
    assert Endpoint("http://judge.example.com", "sglang").proxy() == DIRECT


def test_a_proxy_of_another_kind_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://me:secret@proxy:1080")
    with pytest.raises(SettingsError, match="only http://HOST:PORT proxies can be used, not socks5") as caught:
        Endpoint("https://api.example.com", "openai").proxy()
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(Proxy("http://proxy", {"Proxy-Authorization": "Basic secret"}))


def test_public_hosts() -> None:
    assert [is_public(host) for host in ("api.openai.com", "8.8.8.8", "node17", "", "10.1.1.1", "a.internal")] == [
        *(True, True),
        *(False, False, False, False),
    ]
