"""One HTTP call to one SGLang engine, awaited or blocking; whatever goes wrong becomes an EngineError of a kind.

Both kinds of call go straight to the engine: a proxy of the environment (http_proxy), meant for the way out of the
cluster, is not used, and no redirect followed. An answer is read up to MAX_REPLY_BYTES. `key` is sent as a bearer token.
"""

from __future__ import annotations

import json
import time
from typing import Any

import aiohttp
import orjson
import urllib3

from megatron_sip.rollout.protocol import EngineError, FailureKind
from megatron_sip.serving.http_reply import (
    MAX_REPLY_BYTES,
    ReplyTooLongError,
    masked,
    masked_reply,
    plain,
    printable,
    read_reply,
)

CONNECT_S = 10.0
"""An engine's node that is switched off costs a blocking call this long, however long the answer may take."""
PIECE = 2**20
"""Bytes of an answer that a blocking call reads at a time."""


async def send(
    session: aiohttp.ClientSession,
    url: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    timeout_s: float,
    connect_timeout_s: float,
    key: str | None = None,
) -> Any:
    """The JSON value (or text, when it is none) that the engine at base `url` answers. Raises EngineError."""
    timeout = aiohttp.ClientTimeout(total=timeout_s, connect=connect_timeout_s)
    what = f"{method} {path}"
    try:
        async with session.request(
            method,
            url + path,
            json=body,
            timeout=timeout,
            headers=_key_header(key),
            allow_redirects=False,
        ) as response:
            raw = await read_reply(response)
            status = response.status
    except TimeoutError:
        raise EngineError("timeout", url, f"{what} gave no answer within {timeout_s:g} s") from None
    except ReplyTooLongError as error:
        raise EngineError("bad-response", url, f"{what}: {error}") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:  # aiohttp's own would show the key in a traceback
        raise EngineError("connection", url, f"{what}: {printable(masked(plain(error), key))}") from None
    return _answer(raw, status, url, what, key)


def call(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    timeout_s: float,
    key: str | None = None,
) -> Any:
    """The blocking twin of `send`, for threads without an event loop.

    `timeout_s` bounds each wait for the engine and the reading of its answer, CONNECT_S the connection to it.
    """
    data = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json", **_key_header(key)}
    timeout = urllib3.Timeout(connect=min(CONNECT_S, timeout_s), read=timeout_s)
    what = f"{method} {path}"
    try:
        with (
            urllib3.PoolManager(retries=False) as pool,
            pool.request(
                method,
                url + path,
                body=data,
                headers=headers,
                timeout=timeout,
                redirect=False,
                preload_content=False,
            ) as response,
        ):
            return _answer(_read(response, timeout_s), response.status, url, what, key)
    except (TimeoutError, urllib3.exceptions.ReadTimeoutError):
        raise EngineError("timeout", url, f"{what} gave no answer within {timeout_s:g} s") from None
    except (
        urllib3.exceptions.NewConnectionError
    ) as error:  # refused, no such host; urllib3 counts it among the time-outs
        raise EngineError("connection", url, f"{what}: {printable(masked(plain(error), key))}") from None
    except urllib3.exceptions.ConnectTimeoutError:
        raise EngineError("connection", url, f"{what}: no connection within {timeout.connect_timeout:g} s") from None
    except ReplyTooLongError as error:
        raise EngineError("bad-response", url, f"{what}: {error}") from None
    except (OSError, urllib3.exceptions.HTTPError) as error:
        raise EngineError("connection", url, f"{what}: {printable(masked(plain(error), key))}") from None


def _key_header(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _read(response: urllib3.BaseHTTPResponse, timeout_s: float) -> bytes:
    """The body, up to MAX_REPLY_BYTES and for `timeout_s` in all. Raises ReplyTooLongError, TimeoutError."""
    deadline, pieces, size = time.monotonic() + timeout_s, [], 0
    while piece := response.read1(PIECE):
        size += len(piece)
        if size > MAX_REPLY_BYTES:
            raise ReplyTooLongError(f"more than {MAX_REPLY_BYTES >> 20} MB in one reply")
        if time.monotonic() > deadline:
            raise TimeoutError
        pieces.append(piece)
    return b"".join(pieces)


def _answer(content: bytes, status: int, url: str, what: str, key: str | None) -> Any:
    raw = masked_reply(content, key)
    if status >= 300:
        kind: FailureKind = "http-5xx" if status >= 500 else "http-4xx" if status >= 400 else "http-3xx"
        text = printable(raw[:500].decode(errors="replace"))
        raise EngineError(kind, url, f"{what} answered {status}: {text}")
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw.decode(errors="replace")
