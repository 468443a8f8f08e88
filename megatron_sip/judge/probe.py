"""What a judge's server says about itself before any work: whether it is there, what it serves, how much it reads."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from megatron_sip.errors import UserError
from megatron_sip.judge.settings import Endpoint, EndpointKind
from megatron_sip.serving.http import Server
from megatron_sip.serving.http_reply import ReplyTooLongError, masked, plain, printable, read_reply

ANSWER_TIMEOUT_S = 10.0


class EndpointError(UserError, RuntimeError):
    """An endpoint that does not answer at start; the message names its URL."""


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """model: the name it serves under. tokenizer: its folder or name. context_tokens: of a request with its answer.

    None: the server does not say.
    """

    model: str | None = None
    tokenizer: str | None = None
    context_tokens: int | None = None


async def probe(server: Server, endpoint: Endpoint, timeout_s: float) -> EndpointFacts:
    """Wait until the server answers, and read what it reports. Raises EndpointError after `timeout_s`."""
    path = "/model_info" if endpoint.kind == "sglang" else "/v1/models"
    loop = asyncio.get_running_loop()
    deadline, last = loop.time() + timeout_s, "no answer"
    timeout = aiohttp.ClientTimeout(total=min(ANSWER_TIMEOUT_S, timeout_s))
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while loop.time() < deadline:
            try:
                status, report = await _get(session, server, path)
                if status == 200:
                    models = report if endpoint.kind == "openai" else (await _get(session, server, "/v1/models"))[1]
                    return read_facts(endpoint.kind, endpoint.model, report, models)
                last = f"status {status}" + (f", redirects to {report}" if 300 <= status < 400 else "")
                if 300 <= status < 400 or status in (401, 403):
                    break
            except ReplyTooLongError as error:  # no server that starts up slowly
                last = plain(error)
                break
            except (aiohttp.ClientError, OSError, ValueError) as error:
                last = plain(error)
            await asyncio.sleep(min(1.0, max(0.0, deadline - loop.time())))
    raise EndpointError(
        f"judge endpoint {server.url} ({endpoint.kind}) gave no good answer to {path} within {timeout_s:.0f} s: "
        f"{printable(masked(last, server.key))}. Is the server running, and is the URL right?"
    )


def read_facts(kind: EndpointKind, model: str, report: Any, models: Any) -> EndpointFacts:
    """Facts from SGLang's /model_info (`report`) and the list of /v1/models, whatever shape they have."""
    cards = models.get("data") if isinstance(models, dict) else None
    known = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    card = next((card for card in known if card.get("id") == model), known[0] if known else {})
    context = card.get("max_model_len")  # SGLang and vLLM report it, hosted services do not
    length = context if type(context) is int and context > 0 else None
    if kind == "openai":
        return EndpointFacts(None, None, length)
    info = report if isinstance(report, dict) else {}
    served, path, tokenizer = (
        value if isinstance(value := info.get(name), str) else None
        for name in ("served_model_name", "model_path", "tokenizer_path")
    )
    return EndpointFacts(served or path, tokenizer or path, length)


async def _get(session: aiohttp.ClientSession, server: Server, path: str) -> tuple[int, Any]:
    """(status, JSON body); the body is None where it is none, or no success. Of a redirect, where to."""
    proxy = server.proxy
    async with session.get(  # no headers of the session: aiohttp would send them to the proxy, too
        server.url + path,
        headers=server.headers,
        allow_redirects=False,
        proxy=proxy.url,
        proxy_headers=proxy.headers,
    ) as response:
        if response.status != 200:
            return response.status, response.headers.get("Location")
        content = await read_reply(response)
    try:
        return 200, orjson.loads(content)
    except orjson.JSONDecodeError:
        return 200, None
