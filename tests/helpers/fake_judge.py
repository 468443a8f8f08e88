"""An in-process judge server for fault injection: OpenAI-compatible and SGLang-native endpoints with a known truth.

Candidates carry their quality as `q=0.73` and `unsafe` when they are; verdicts follow from these and from nothing else.
`faults` decides, request by request, what goes wrong.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Literal

from aiohttp import web
from app_server import AppServer

Fault = Literal["status", "rate-limit", "hang", "not-json", "wrong-shape", "no-verdict", "disconnect"]
FaultPlan = Callable[[int], Fault | None]

_CODE = re.compile(r"the code ([0-9a-f]{8})")
_QUALITY = re.compile(r"q=(\d+(?:\.\d+)?)")


def quality_of(text: str) -> float:
    found = _QUALITY.search(text)
    assert found is not None, f"the test's candidate carries no quality: {text!r}"
    return float(found[1])


def truthful_answer(prompt: str) -> str:
    """The verdict of a perfect judge on the prompt's fenced texts."""
    found = _CODE.search(prompt)
    code = found[1] if found else "[0-9a-f]{8}"
    fields = dict(re.findall(rf"\[begin ([a-z0-9 ]+) {code}\]\n(.*?)\n\[end \1 {code}\]", prompt, re.DOTALL))
    if "option 1" in fields:
        better = 1 if quality_of(fields["option 1"]) > quality_of(fields["option 2"]) else 2
        return f"I looked at both.\n\nConclusion: Option {better}"
    candidate = fields["candidate"]
    if "FINAL DECISION" in prompt:
        return f"A short reason.\nFINAL DECISION: {'NO' if 'unsafe' in candidate else 'YES'}"
    return f"RATING: {'GOOD' if quality_of(candidate) > 0.5 else 'BAD'}"


class FakeJudge(AppServer):
    """See the module. `requests` counts what arrived, `prompts` keeps what was shown."""

    def __init__(
        self,
        faults: FaultPlan = lambda index: None,
        answer: Callable[[str], str] = truthful_answer,
        *,
        context: int | None = None,
        model: str = "fake",
        refuses: Callable[[dict[str, Any]], str | None] = lambda body: None,
        edits: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda body, reply: reply,
    ) -> None:
        """context, model: what the server reports about itself. refuses: why a body gets status 400, or None.

        edits: what becomes of a good reply to a body.
        """
        routes = {"POST /v1/chat/completions": self._complete, "GET /v1/models": self._models}
        super().__init__(routes | {"POST /generate": self._score, "GET /model_info": self._info})
        self.requests = 0
        self.prompts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._faults = faults
        self._answer = answer
        self._context = context
        self._model = model
        self._refuses = refuses
        self._edits = edits

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": self._context}]})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"model_path": self._model})

    async def _score(self, request: web.Request) -> web.Response:
        """SGLang's native answer to a likelihood request: each token is as likely as its place says."""
        self.requests += 1
        body = await request.json()
        meta = {"prompt_tokens": 1, "completion_tokens": 0}
        answers = []
        for ids, start in zip(body["input_ids"], body["logprob_start_len"], strict=True):
            entries = [[-0.01 * place, token, None] for place, token in enumerate(ids) if place >= start]
            answers.append({"text": "", "meta_info": {**meta, "input_token_logprobs": entries}})
        return web.json_response(answers)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        index, self.requests = self.requests, self.requests + 1
        body = await request.json()
        prompt = body["messages"][0]["content"]
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.prompts.append(prompt)
        if (refusal := self._refuses(body)) is not None:
            return web.json_response({"error": {"message": refusal, "type": "invalid_request_error"}}, status=400)
        match self._faults(index):
            case "status":
                return web.Response(status=500 + index % 4, text="out of order")
            case "rate-limit":
                return web.Response(status=429, headers={"Retry-After": "0.05"})
            case "hang":
                await asyncio.sleep(3600)
            case "not-json":
                return web.Response(text="<html>Conclusion: Option 1</html>")
            case "wrong-shape":
                return web.json_response({"verdict": "Conclusion: Option 1", "choices": {}})
            case "no-verdict":
                return web.json_response(reply("The first one? Perhaps the second.", body))
            case "disconnect":
                assert request.transport is not None
                request.transport.close()
        return web.json_response(self._edits(body, reply(self._answer(prompt), body)))


def reply(text: str, body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion with the same text in each of the choices asked for."""
    choices = [{"message": {"role": "assistant", "content": text}} for _ in range(body.get("n", 1))]
    return {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 5 * len(choices)}}
