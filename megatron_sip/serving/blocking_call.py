"""One blocking HTTP call to a server of one's own cluster, for threads without an event loop: control of engines, health.

It goes straight to the server: a proxy of the environment (http_proxy), meant for the way out of the cluster, is not used,
and no redirect followed.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
import urllib3

from megatron_sip.serving.failures import failure, status_failure
from megatron_sip.serving.http_reply import MAX_REPLY_BYTES, ReplyTooLongError, masked_reply, plain

CONNECT_S = 10.0
"""A server's node that is switched off costs a call this long, however long the answer may take."""
PIECE = 2**20
"""Bytes of an answer that are read at a time."""


def call(url: str, method: str, path: str, body: Any = None, *, timeout_s: float, key: str | None = None) -> Any:
    """The JSON value (or text, when it is none) that the server at base `url` answers. Raises RequestError.

    `timeout_s` bounds each wait for the server and the reading of its answer, which is read up to MAX_REPLY_BYTES;
    CONNECT_S the connection to it. `key` is sent as a bearer token.
    """
    data = None if body is None else orjson.dumps(body)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    timeout = urllib3.Timeout(connect=min(CONNECT_S, timeout_s), read=timeout_s)
    where = url + path
    try:
        with (
            urllib3.PoolManager(retries=False) as pool,
            pool.request(
                method,
                where,
                body=data,
                headers=headers,
                timeout=timeout,
                redirect=False,
                preload_content=False,
            ) as response,
        ):
            content = masked_reply(_read(response, timeout_s), key)
    except (TimeoutError, urllib3.exceptions.ReadTimeoutError):
        raise failure("timeout", where, key, f"gave no answer within {timeout_s:g} s") from None
    except (
        urllib3.exceptions.NewConnectionError
    ) as error:  # refused, no such host; urllib3 counts it among the time-outs
        raise failure("connection", where, key, plain(error)) from None
    except urllib3.exceptions.ConnectTimeoutError:
        raise failure("connection", where, key, f"no connection within {timeout.connect_timeout:g} s") from None
    except ReplyTooLongError as error:
        raise failure("bad-response", where, key, str(error)) from None
    except (OSError, urllib3.exceptions.HTTPError) as error:
        raise failure("disconnected", where, key, plain(error)) from None
    if response.status != 200:
        raise status_failure(where, key, response.status, response.headers, content)
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return content.decode(errors="replace")


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
