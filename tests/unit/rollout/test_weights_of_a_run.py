"""A pool takes only the weights of its own run: another run's trainer may have pushed to the same engine at the same step."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from app_server import AppServer

from megatron_sip.rollout.pool import PoolSettings, SGLangPool
from megatron_sip.rollout.sampling import Failure, SamplingSettings

OURS = PoolSettings(backoff_s=0.01, max_backoff_s=0.02, down_s=0.3, run_id="ours")


class Engine(AppServer):
    """One that has weights of `version`."""

    def __init__(self, version: str) -> None:
        super().__init__({"POST /generate": self.generate, "GET /model_info": self.model_info})
        self.version = version
        self.calls = 0

    async def generate(self, _: web.Request) -> web.Response:
        self.calls += 1
        counts = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}
        meta: dict[str, Any] = {"weight_version": self.version, "finish_reason": {"type": "length"}, **counts}
        return web.json_response(
            [{"output_ids": [1], "meta_info": meta | {"output_token_logprobs": [[-0.5, 1, None]]}}]
        )

    async def model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})


async def test_the_same_step_s_weights_of_another_run_are_refused() -> None:
    one = SamplingSettings(max_new_tokens=1)
    async with Engine("ours-7") as ours, Engine("theirs-7") as theirs, SGLangPool([ours.url, theirs.url], OURS) as pool:
        found = await pool.generate([[1], [2]], one, weight_version="7")
        assert [completion.weight_version for made in found for completion in made] == ["7", "7"]
        assert (ours.calls, theirs.calls) == (2, 0)
        ours.version = "theirs-8"
        (lost,) = await pool.generate([[1]], one, weight_version="8")
    assert isinstance(lost, Failure)
    assert "has weights 'theirs-8', not 'ours-8'" in lost.reason
