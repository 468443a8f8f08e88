"""An engine that outlived its trainer: killed inside a push, it left the engine paused and in an open weight update.

A paused engine answers its health and its model, and lets every generation wait for ever.
"""

from __future__ import annotations

from megatron_sip.rollout.protocol import EngineError
from megatron_sip.serving.blocking_call import call


def end_open_update(url: str, timeout_s: float, key: str | None = None) -> None:
    """End the weight update and the pause that the engine at `url` may be in, of a trainer that is no more.

    Its weights may then be partly those of the update, under the version before it: push before anything is sampled. An
    engine that still receives or loads weights ends that first, which `timeout_s` bounds. Raises EngineError.
    """
    try:
        call(url, "POST", "/end_weight_update", {}, timeout_s=timeout_s, key=key)
    except EngineError as error:
        if error.kind == "timeout":
            raise EngineError(
                "timeout",
                url,
                f"still in the weight update of another trainer after {timeout_s:g} s: end that trainer, or restart the "
                "engine if there is none",
            ) from error
        if "no weight-update session is open" not in str(error):
            raise
    call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s, key=key)
