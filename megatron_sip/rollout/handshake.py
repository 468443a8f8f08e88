"""What trainer and engines settle before training: the same model's token ids, and no weight update left open.

An engine that outlived its trainer, killed inside a push, is paused and in an open weight update: it answers its health and
its model, and lets every generation wait for ever.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from megatron_sip.errors import UserError
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.sglang_wire import GENERATE_PATH, generate_body

Control = Callable[..., Awaitable[Any]]
"""`await control(method, path, body=None)`: the JSON that the engine answers, or RequestError."""


class WeightSyncError(UserError, RuntimeError):
    """The weights did not reach every engine, or none; the message says which and why. Raised on all ranks alike."""


@dataclass(frozen=True, slots=True)
class ModelContract:
    """What the trainer expects of every engine.

    `vocab_size` is the HF config's (no padding for tensor parallelism), `context_length` the tokens of prefix and
    completion together, and `probe_ids` what the trainer's tokenizer makes of `probe_text` without special tokens.
    """

    vocab_size: int
    context_length: int
    probe_text: str
    probe_ids: tuple[int, ...]


async def check_engine(control: Control, url: str, contract: ModelContract) -> None:
    """Raise ValueError, naming the engine and what to do, when it does not fulfil `contract`."""
    models = await control("GET", "/v1/models")
    served = int(models["data"][0]["max_model_len"])
    if served < contract.context_length:
        raise ValueError(
            f"the engine at {url} has a context of {served} tokens, training needs {contract.context_length}: "
            "start it with a larger --context-length or lower --seq-length"
        )
    vocab_size = await _vocab_size(control, url)
    if vocab_size != contract.vocab_size:
        raise ValueError(
            f"the engine at {url} serves a vocabulary of {vocab_size} tokens, the trainer's checkpoint has "
            f"{contract.vocab_size}: serve the checkpoint that is trained"
        )
    body = {"prompt": contract.probe_text, "add_special_tokens": False}
    ids = (await control("POST", "/tokenize", body))["tokens"]
    if ids != list(contract.probe_ids):
        raise ValueError(
            f"the engine at {url} has another tokenizer than the trainer: it makes {len(ids)} tokens of a test text "
            f"that has {len(contract.probe_ids)} here, or others: give both the same tokenizer files"
        )


async def _vocab_size(control: Control, url: str) -> int:
    """SGLang has no field for it, but names it when it refuses a token id outside of the vocabulary."""
    sampling = {"max_new_tokens": 1, "temperature": 0.0}
    try:
        await control("POST", GENERATE_PATH, generate_body([0], sampling, logprobs_of=[2**31 - 1]))
    except RequestError as error:
        size = re.search(r"valid range is \[0, (\d+)\)", str(error))
        if size is None:
            raise
        return int(size.group(1))
    raise RequestError("bad-response", f"{url}: accepted a token id far outside of any vocabulary")


def version_of_run(run_id: str, version: str) -> str:
    """What an engine is told that its weights are, so that those of two runs at one step are not taken for each other."""
    return f"{run_id}-{version}" if run_id else version


def end_open_update(url: str, timeout_s: float, key: str | None = None) -> None:
    """End the weight update and the pause that the engine at `url` may be in, of a trainer that is no more.

    Its weights may then be partly those of the update, under the version before it: push before anything is sampled. An
    engine that still receives or loads weights ends that first, which `timeout_s` bounds. Raises RequestError.
    """
    try:
        call(url, "POST", "/end_weight_update", {}, timeout_s=timeout_s, key=key)
    except RequestError as error:
        if error.kind == "timeout":
            raise RequestError(
                "timeout",
                f"{url}: still in the weight update of another trainer after {timeout_s:g} s: end that trainer, or restart "
                "the engine if there is none",
            ) from error
        if "no weight-update session is open" not in str(error):
            raise
    call(url, "POST", "/continue_generation", {}, timeout_s=timeout_s, key=key)
