"""What a judge's server says about itself before any work: whether it is there, what it serves, how much it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from megatron_sip.errors import UserError
from megatron_sip.hf.folder import HF_SUBFOLDER
from megatron_sip.judge.settings import Endpoint, EndpointKind
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.http import HttpPool
from megatron_sip.serving.server import Server

ANSWER_TIMEOUT_S = 10.0


class EndpointError(UserError, RuntimeError):
    """An endpoint that does not answer at start; the message names its URL."""


@dataclass(frozen=True, slots=True)
class EndpointFacts:
    """model: the name it serves under. tokenizer: its folder or name. context_tokens: of a request with its answer. weights:
    what tells those in its folder from others that were there before, where the folder is on this machine.

    None: the server does not say.
    """

    model: str | None = None
    tokenizer: str | None = None
    context_tokens: int | None = None
    weights: str | None = None


async def probe(pool: HttpPool, server: Server, endpoint: Endpoint, timeout_s: float) -> EndpointFacts:
    """Wait until the server answers, and read what it reports. Raises EndpointError after `timeout_s`."""
    path = "/model_info" if endpoint.kind == "sglang" else "/v1/models"
    loop = asyncio.get_running_loop()
    deadline, last = loop.time() + timeout_s, "no answer"
    get = partial(pool.call, server, "GET", timeout_s=min(ANSWER_TIMEOUT_S, timeout_s))
    while loop.time() < deadline:
        try:
            report = await get(path)
            models = report if endpoint.kind == "openai" else await _optional(get("/v1/models"))
            return read_facts(endpoint.kind, endpoint.model, report, models)
        except RequestError as error:
            last = error.detail
            moved_or_locked = 300 <= error.status < 400 or error.status in (401, 403)
            if moved_or_locked or error.kind == "bad-response":  # no server that starts up slowly
                break
        await asyncio.sleep(min(1.0, max(0.0, deadline - loop.time())))
    raise EndpointError(
        f"judge endpoint {server.url} ({endpoint.kind}) gave no good answer to {path} within {timeout_s:.0f} s: "
        f"{last}. Is the server running, and is the URL right?"
    )


async def _optional(answer: Coroutine[Any, Any, Any]) -> Any:
    """What a server need not have: None where it answers with another status than 200."""
    try:
        return await answer
    except RequestError as error:
        if error.status:
            return None
        raise


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
    return EndpointFacts(served or path, tokenizer or path, length, _weights_of(path))


def model_name(served: str) -> str:
    """What tells a model from others, wherever its folder lies: of an export, RUN/hf, the folders above it belong to it."""
    path = PurePath(served)
    return "/".join(path.parts[-3:]) if path.name == HF_SUBFOLDER else path.name


def _weights_of(folder: str | None) -> str | None:
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []  # a hub's name is no folder here
    stats = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return str(stats) if stats else None
