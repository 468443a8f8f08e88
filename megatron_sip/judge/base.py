"""What judge and rewriter have in common: a client of the teacher's servers, open while they are, and counters."""

from __future__ import annotations

import math
from collections import Counter
from typing import Self

import numpy as np

from megatron_sip.judge.settings import ClientSettings, SettingsError
from megatron_sip.judge.teacher import CHECK_TIMEOUT_S, TeacherClient

UNKNOWN_CODE = "00000000"
"""As long as a fence code, for prompts of which only the length matters."""


class AsksTeacher:
    """Use as an async context manager on one event loop; `check` first, so that mistakes show at start."""

    def __init__(self, settings: ClientSettings | None, silence_s: float = math.inf) -> None:
        """settings: None where nobody is asked. silence_s: calls fail once no server has answered any for so long."""
        self._teacher = None if settings is None else TeacherClient(settings, silence_s)
        self._counts: Counter[str] = Counter()

    @property
    def model(self) -> str | None:
        """The name of the model that answers, known after `check`; None where nobody is asked."""
        return None if self._teacher is None else self._teacher.model

    @property
    def _client(self) -> TeacherClient:
        assert self._teacher is not None, "settings without servers ask nobody"
        return self._teacher

    async def __aenter__(self) -> Self:
        if self._teacher is not None:
            await self._teacher.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._teacher is not None:
            await self._teacher.__aexit__(*exc_info)

    async def check(self, timeout_s: float = CHECK_TIMEOUT_S) -> None:
        """Raises EndpointError naming an endpoint that does not answer within `timeout_s`, and settings mistakes."""
        if self._teacher is not None:
            await self._teacher.check(timeout_s)

    async def gone(self) -> str | None:
        """Why nobody is left to ask, see `TeacherClient.gone`; None: somebody is, or nobody needs to be."""
        return None if self._teacher is None else await self._teacher.gone()

    def _check_reasoning(self, what: str) -> None:
        """Raises SettingsError where `what` is written by a model that reasons first and has no tokens for it."""
        endpoint = self._client.settings.endpoint
        if self._client.reasoning.always and not endpoint.reasoning_tokens:
            raise SettingsError(
                f"{what}: the model at {endpoint.url} reasons before each answer, by its chat template, and has no tokens for "
                f"it: give {endpoint.flag('reasoning-tokens')}, for example 2048"
            )

    def counters(self) -> dict[str, float]:
        """Totals since the start as flat numbers, those of the transport included, and the shares that follow from them."""
        if self._teacher is None:
            return dict(self._counts)
        client = self._teacher
        values: dict[str, float] = {**self._counts, **client.counts, **client.pool.counts}
        values["cached-share"] = client.counts["cached"] / max(1, client.counts["calls"])
        shares = (50, 95, 99)
        for share, seconds in zip(shares, np.percentile(client.pool.latencies or [0.0], shares), strict=True):
            values[f"latency-p{share}-s"] = float(seconds)
        for key in list(values):
            kind, _, name = key.partition("/")
            if kind == "first-shown-preferred":
                values[key] = values[key] / max(1.0, values[f"verdicts/{name}"])
        return values
