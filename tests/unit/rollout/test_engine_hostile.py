"""Engines whose replies are too long, lead elsewhere or cannot be read, and engines that demand a key."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_server import JSON, RawServer, reply_of

from megatron_sip.rollout.handshake import end_open_update
from megatron_sip.rollout.pool import PoolSettings, SGLangPool, counted_as
from megatron_sip.rollout.sampling import Failure, SamplingSettings, read_completions
from megatron_sip.rollout.sync_distributed import DistributedWeightSync
from megatron_sip.rollout.weight_group import SyncSettings, listening_store
from megatron_sip.rollout.weight_sync import SyncRank, WeightSyncError
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import BadResponseError, RequestError

KEY = "engine-key-4711"
ONE = SamplingSettings(max_new_tokens=1)
ONCE = PoolSettings(attempts=1, call_timeout_s=20.0, key=KEY)


def endless(request: bytes) -> Iterator[bytes]:
    yield JSON + b"\r\n"
    yield from (bytes(2**20) for _ in range(10**6))


def sent_key(request: bytes) -> str:
    found = re.search(rb"(?i)authorization: bearer (\S+)", request)
    assert found is not None
    return found[1].decode()


REPLIES: dict[str, tuple[Any, str, str]] = {
    "endless": (endless, "bad-response", "more than 64 MB in one reply"),
    "redirect": (lambda request: [b"HTTP/1.1 307 Moved\r\nLocation: http://10.0.0.1/\r\n\r\n"], "http-3xx", "307"),
    "long header": (lambda request: [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n{}"], "connection", "/model"),
    "ssh": (lambda request: [b"SSH-2.0-OpenSSH_9.6\r\n"], "connection", "/model"),
    "nested": (lambda request: [JSON + b"\r\n" + b"[" * 10**5], "bad-response", "not to be read"),
    "echo in a result": (lambda request: [reply_of([sent_key(request)])], "bad-response", "***"),
    "echo": (lambda request: [reply_of(sent_key(request), b"HTTP/1.1 401 No\r\n")], "http-4xx", "***"),
}


@pytest.mark.parametrize("name", REPLIES)
async def test_a_reply_that_cannot_be_taken_is_a_failure_without_the_key(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer, kind, message = REPLIES[name]
    async with RawServer(answer) as server:
        async with SGLangPool([server.url], ONCE) as pool:
            (lost,) = await pool.generate([[1]], ONE)
        assert isinstance(lost, Failure)
        assert lost.kind == kind
        said = [lost.reason, repr(pool.settings), repr(pool.counters), caplog.text]
        if name not in ("nested", "echo in a result"):  # that is text, for those who want text
            blocking = functools.partial(call, server.url, "GET", "/model_info", timeout_s=20.0, key=KEY)
            with pytest.raises(RequestError, match=re.escape(message)) as caught:
                await asyncio.to_thread(blocking)
            assert counted_as(caught.value) == kind
            assert caught.value.__cause__ is None
            said.append(str(caught.value))
        assert all(sent_key(request) == KEY for request in server.requests)
    assert KEY not in "".join(said)
    assert message.replace("/model", "/generate") in lost.reason


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("length")
TREES = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("meta_info", "finish_reason", "type", "output_ids", "output_token_logprobs", "weight_versions"),
                    *("weight_version", "prompt_tokens", "version"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
GOOD = {
    "output_ids": [5],
    "meta_info": {
        "finish_reason": {"type": "length"},
        "weight_version": "1",
        "output_token_logprobs": [[-1.0, 5, None]],
    },
}


def replaced(tree: Any, path: list[int], value: Any) -> Any:
    """`tree` with what lies at `path` (numbers, each modulo the size) replaced."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    place = sorted(copy)[path[0] % len(copy)] if isinstance(copy, dict) else path[0] % len(copy)
    copy[place] = replaced(copy[place], path[1:], value)
    return copy


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=5), TREES, TREES)
def test_no_reply_leaves_the_parser_as_another_error(path: list[int], value: Any, tree: Any) -> None:
    """Wholly made up, and good ones with one place replaced."""
    for reply in (tree, [tree], [replaced(GOOD, path, value)]):
        try:
            [result], counts = read_completions(reply, ONE, 9, None)
        except BadResponseError:
            continue
        assert [type(value) for value in result.logprobs] == [float]
        assert -float("inf") < result.logprobs[0] <= 1e-3
        assert all(type(count) is int for count in counts)


async def test_engines_that_demand_a_key_get_it_in_every_call() -> None:
    with FakeEngine() as engine:
        engine.key = KEY
        quick = SyncSettings(timeout_s=5.0, control_timeout_s=2.0, key=KEY)
        end_open_update(engine.url, 2.0, KEY)
        sync = DistributedWeightSync([engine.url], SyncRank(), quick)
        sync.connect()
        sync.push([("w", torch.ones(3))], version="7")
        sync.close()
        assert engine.version == "7"
        assert len(engine.calls) >= 10
        async with SGLangPool([engine.url], PoolSettings(key=KEY)) as pool:
            await pool.wait_ready(5.0)
            assert not await pool.take_seeds()
        without = DistributedWeightSync([engine.url], SyncRank(), SyncSettings(timeout_s=5.0, control_timeout_s=2.0))
        with pytest.raises(WeightSyncError, match="status 401"):
            without.connect()
    assert KEY not in repr(quick)


def test_the_store_of_a_weight_group_listens_at_its_address_alone() -> None:
    store = listening_store("127.0.0.1", timedelta(seconds=5))
    port = f"{store.port:04X}"
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port}")]
    assert listening == [f"0100007F:{port}"]
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))
    client.set("key", json.dumps(1))
    assert store.get("key") == b"1"


def test_what_is_wrong_with_an_address_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url, told in ((f"http://127.0.0.1:{port}", "refused"), ("http://no-such-host.invalid:1", "resolve|not known")):
        with pytest.raises(RequestError, match=told) as error:
            call(url, "GET", "/health", timeout_s=5)
        assert error.value.kind == "connection"
