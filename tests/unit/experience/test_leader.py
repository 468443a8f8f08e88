"""How local servers are started, and which engines a leader uses first."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine
from ports import kept_port

from megatron_sip.experience.leader import ClientsSettings, EngineSettings, Leader, rotated_urls
from megatron_sip.rollout.pool import PoolSettings, SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.serving.launch import (
    LocalServer,
    ServerSettings,
    numbered,
    server_command,
    server_environment,
    visible_devices,
)
from megatron_sip.serving.server import Server


@pytest.mark.parametrize(
    ("ours", "devices", "expected"),
    [
        (None, (2, 3), "2,3"),
        ("4,5,6,7", (2, 3), "6,7"),
        ("7, 3 ,5", (1, 0), "3,7"),
        ("GPU-1a2b,GPU-3c4d,GPU-5e6f", (1,), "GPU-3c4d"),
        ("MIG-8d0c,MIG-77f1", (1,), "MIG-77f1"),
    ],
)
def test_a_servers_devices_are_among_those_that_we_see(
    ours: str | None, devices: tuple[int, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ours is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    assert server_environment(ServerSettings("model", devices=devices))["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_a_server_s_threads_wait_asleep_unless_the_user_wants_them_to_spin(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    assert server_environment(ServerSettings("model"))["OMP_WAIT_POLICY"] == (own or "PASSIVE")


@pytest.mark.parametrize(("ours", "device"), [("4,5", 2), ("", 0)])
def test_a_device_that_we_do_not_see_is_refused(ours: str, device: int) -> None:
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES='{ours}' holds .* number {device} of them"):
        visible_devices((device,), ours)


def test_servers_of_one_node_have_log_devices_and_seed_of_their_own() -> None:
    settings = ServerSettings("model", devices=(2, 3), seed=7, log_file=Path("engine.log"))
    both = [numbered(settings, index, 2) for index in range(2)]
    assert [one.seed for one in both] == [7, 8]  # with one seed they would draw alike
    assert [one.devices for one in both] == [(2,), (3,)]
    assert [str(one.log_file) for one in both] == ["engine.0.log", "engine.1.log"]


def test_a_server_writes_no_line_for_each_request() -> None:
    assert "--log-level-http=warning" in server_command(ServerSettings("model"), 30000, 29500, on_cpu=False)


def test_a_server_is_found_healthy_past_a_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{kept_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    with FakeEngine() as engine:
        engine.answers["/model_info"] = 200, {"model_path": "org/model"}
        for model, found in (("org/model", True), ("org/other", False)):
            server = LocalServer(ServerSettings(model))
            server._port = int(engine.url.rpartition(":")[2])
            assert server._answers() is found


class Engines(SGLangPool):
    """A pool whose engines only count their calls."""

    def __init__(self, urls: list[str], calls: Counter[str]) -> None:
        super().__init__(urls)
        self.calls = calls
        vars(self._http)["_exchange"] = self._answer

    async def _answer(self, server: Server, *_: Any) -> bytes:
        self.calls[server.url] += 1
        await asyncio.sleep(0)
        logprobs = [[-1.0, 7, None]]
        meta = {"finish_reason": {"type": "length"}, "weight_version": "1", "output_token_logprobs": logprobs}
        return json.dumps([{"output_ids": [7], "meta_info": meta}]).encode()


@pytest.mark.parametrize(
    ("leaders", "prompts", "engines"),
    [(64, 4, 32), (8, 32, 32), (3, 64, 32), (16, 3, 16)],
)
async def test_the_leaders_together_load_every_engine_equally(leaders: int, prompts: int, engines: int) -> None:
    urls = [f"http://engine-{index}:30000" for index in range(engines)]
    calls: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        orders = [rotated_urls(urls, replica, prompts) for replica in range(leaders)]
        pools = [await stack.enter_async_context(Engines(order, calls)) for order in orders]
        prefixes = [[5, 6]] * prompts
        await asyncio.gather(*(pool.generate(prefixes, SamplingSettings(max_new_tokens=1)) for pool in pools))
    assert all(sorted(order) == sorted(urls) for order in orders)
    assert calls == dict.fromkeys(urls, leaders * prompts // engines)


async def test_a_run_opens_engines_that_a_killed_run_left_paused_and_in_an_update() -> None:
    """Their check asks for a generation, which a paused engine never answers."""
    tokenizer = SimpleNamespace(encode=lambda *_, **__: [1, 2])
    with FakeEngine() as engine:
        engine.paused = engine.updating = True
        engine.answers |= {
            "/v1/models": (200, {"data": [{"max_model_len": 64}]}),
            "/generate": (400, {"message": "the valid range is [0, 32)"}),
            "/tokenize": (200, {"tokens": [1, 2]}),
        }
        async with AsyncExitStack() as clients:
            pool = PoolSettings(call_timeout_s=5.0, max_concurrency=4, vocab_size=32)
            settings = EngineSettings((engine.url,), pool, context_length=10)
            leader: Any = SimpleNamespace(_replica=0, _clients=clients, _servers=ClientsSettings())
            await asyncio.wait_for(Leader._open_engines(leader, settings, tokenizer), 30)
        assert not engine.paused
        assert not engine.updating
