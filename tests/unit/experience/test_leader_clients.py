"""How long a leader waits for engines at its start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sip.experience.leader import CONNECT_SECONDS, ClientsSettings
from megatron_sip.serving.failures import RequestError


class Late:
    """Engines that answer when asked for the second time."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(call_timeout_s=600.0)
        self.waited: list[float] = []

    async def wait_ready(self, timeout_s: float) -> None:
        self.waited.append(timeout_s)
        if len(self.waited) == 1:
            raise RequestError("connection", "http://e: no SGLang engine answered")


async def test_a_run_that_goes_on_waits_for_engines_that_start_again_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines: Any = Late()
    await ClientsSettings(goes_on=True).wait_for(engines, tells=True)
    assert engines.waited == [CONNECT_SECONDS, 600.0 - CONNECT_SECONDS]
    assert "http://e: no SGLang engine answered. They are waited for up to 600 s" in capsys.readouterr().out


async def test_one_that_begins_does_not_wait_for_a_wrong_url() -> None:
    engines: Any = Late()
    with pytest.raises(RequestError, match="no SGLang engine answered"):
        await ClientsSettings().wait_for(engines, tells=True)
    assert engines.waited == [CONNECT_SECONDS]
