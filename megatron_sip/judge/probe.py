"""What a judge's server says about itself before any work: whether it is there, what it serves, how much it reads."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_sip.http import Server
from megatron_sip.judge.settings import Endpoint, EndpointKind

ANSWER_TIMEOUT_S = 10.0


class EndpointError(RuntimeError):
    """An endpoint that does not answer at start; the message names its URL."""


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """model: the name it serves under. tokenizer: its folder or name. context_tokens: of a request with its answer.

    None: the server does not say.
    """

    model: str | None = None
    tokenizer: str | None = None
    context_tokens: int | None = None


async def probe(server: Server, timeout_s: float) -> EndpointFacts:
    """Wait until the server answers, and read what it reports. Raises EndpointError after `timeout_s`."""
    endpoint: Endpoint = server.tag
    path = "/model_info" if endpoint.kind == "sglang" else "/v1/models"
    loop = asyncio.get_running_loop()
    deadline, last = loop.time() + timeout_s, "no answer"
    timeout = aiohttp.ClientTimeout(total=min(ANSWER_TIMEOUT_S, timeout_s))
    async with aiohttp.ClientSession(timeout=timeout, headers=server.headers) as session:
        while loop.time() < deadline:
            try:
                status, report = await _get(session, server.url + path)
                if status == 200:
                    models = (
                        report if endpoint.kind == "openai" else (await _get(session, server.url + "/v1/models"))[1]
                    )
                    return read_facts(endpoint.kind, endpoint.model, report, models)
                last = f"status {status}"
                if status in (401, 403):
                    break
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                last = str(error) or type(error).__name__
            await asyncio.sleep(min(1.0, max(0.0, deadline - loop.time())))
    raise EndpointError(
        f"judge endpoint {server.url} ({endpoint.kind}) gave no good answer to {path} within {timeout_s:.0f} s: "
        f"{last}. Is the server running, and is the URL right?"
    )


def read_facts(kind: EndpointKind, model: str, report: Any, models: Any) -> EndpointFacts:
    """Facts from SGLang's /model_info (`report`) and the list of /v1/models, whatever shape they have."""
    cards = models.get("data") if isinstance(models, dict) else None
    known = [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
    card = next((card for card in known if card.get("id") == model), known[0] if known else {})
    context = card.get("max_model_len")  # SGLang and vLLM report it, hosted services do not
    length = context if isinstance(context, int) and context > 0 else None
    if kind == "openai":
        return EndpointFacts(None, None, length)
    info = report if isinstance(report, dict) else {}
    served, path = info.get("served_model_name"), info.get("model_path")
    return EndpointFacts(served or path, info.get("tokenizer_path") or path, length)


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    """(status, JSON body); the body is None where it is none, or no success."""
    async with session.get(url) as response:
        if response.status != 200:
            return response.status, None
        try:
            return 200, await response.json(content_type=None)
        except ValueError:
            return 200, None
