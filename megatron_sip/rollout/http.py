"""One HTTP call to one SGLang engine, awaited or blocking; whatever goes wrong becomes an EngineError of a kind.

Both kinds of call go straight to the engine: a proxy of the environment (http_proxy), meant for the way out of the
cluster, is not used.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

import aiohttp

from megatron_sip.rollout.protocol import EngineError, FailureKind

CONNECT_S = 10.0
"""An engine's node that is switched off costs a blocking call this long, however long the answer may take."""


async def send(
    session: aiohttp.ClientSession,
    url: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    params: Mapping[str, str] | None = None,
    timeout_s: float,
    connect_timeout_s: float,
) -> Any:
    """The JSON value (or text, when it is none) that the engine at base `url` answers. Raises EngineError."""
    timeout = aiohttp.ClientTimeout(total=timeout_s, connect=connect_timeout_s)
    try:
        async with session.request(method, url + path, json=body, params=params, timeout=timeout) as response:
            raw = await response.read()
            status = response.status
    except TimeoutError as error:
        raise EngineError("timeout", url, f"{method} {path} gave no answer within {timeout_s:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise EngineError("connection", url, f"{method} {path}: {error or type(error).__name__}") from error
    return _answer(raw, status, url, f"{method} {path}")


def call(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    params: Mapping[str, str] | None = None,
    timeout_s: float,
) -> Any:
    """The blocking twin of `send`, for threads without an event loop.

    `timeout_s` bounds each wait for the engine, and CONNECT_S the connection to it.
    """
    query = "?" + urllib.parse.urlencode(params) if params else ""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url + path + query, data=data, method=method, headers={"Content-Type": "application/json"}
    )
    try:
        with _opener().open(request, timeout=timeout_s) as response:
            return _answer(response.read(), response.status, url, f"{method} {path}")
    except urllib.error.HTTPError as error:
        return _answer(error.read(), error.code, url, f"{method} {path}")
    except TimeoutError as error:
        raise EngineError("timeout", url, f"{method} {path} gave no answer within {timeout_s:g} s") from error
    except OSError as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise EngineError("timeout", url, f"{method} {path} was not taken within {timeout_s:g} s") from error
        raise EngineError("connection", url, f"{method} {path}: {error}") from error


class _EarlyTimeout(http.client.HTTPConnection):
    def connect(self) -> None:
        patience = self.timeout
        self.timeout = CONNECT_S if patience is None else min(CONNECT_S, patience)
        try:
            super().connect()
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {self.timeout:g} s") from error
        finally:
            self.timeout = patience
        self.sock.settimeout(patience)


class _EarlyTimeoutTLS(_EarlyTimeout, http.client.HTTPSConnection):
    pass


class _Direct(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_EarlyTimeout, request)


class _DirectTLS(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_EarlyTimeoutTLS, request)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), _Direct, _DirectTLS)


def _answer(raw: bytes, status: int, url: str, what: str) -> Any:
    text = raw.decode(errors="replace")
    if status >= 400:
        kind: FailureKind = "http-5xx" if status >= 500 else "http-4xx"
        raise EngineError(kind, url, f"{what} answered {status}: {text[:500]}")
    try:
        return json.loads(text)
    except ValueError:
        return text
