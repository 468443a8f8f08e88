"""The model that is evaluated: an HF folder or a run's checkpoint, served on this node, or engines that serve it already."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.config.unused_flags import refuse_unused
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeSettings
from megatron_sip.errors import DataError
from megatron_sip.hf.converted import Export, exported_model, is_hf_folder, weights_key
from megatron_sip.hf.folder import HF_SUBFOLDER
from megatron_sip.rollout.pool import PoolSettings
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.launch import LocalServer, ServerSettings, served_dtype
from megatron_sip.serving.local_servers import ENGINE_MARGIN

CALL_S = 60.0


@dataclass(frozen=True, slots=True)
class Model:
    """A model before it is served. folder: its weights, None where running engines have them. step: of a run's checkpoint.

    identity: what must be the same for its answers to be the same: weights, dtype and whatever else is known, in words.
    """

    name: str
    tokenizer: Any
    folder: Path | None
    identity: Mapping[str, str]
    step: str | None = None

    def header(self) -> dict[str, str]:
        """What a file of its generations, and of results about it, says of it."""
        return {"model": self.name} | ({} if self.step is None else {"step": self.step}) | dict(self.identity)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and how its engines are reached or started."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="an HF folder, or a checkpoint folder of a run; served on this node")
    model.add_argument("--url", nargs="+", help="running SGLang engines that serve the model; needs --tokenizer")
    parser.add_argument("--tokenizer", help="HF folder of the model's tokenizer, with --url")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="number format of a served --model; auto: SGLang's choice, but without a GPU float32 is kept",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one call")
    parser.add_argument("--concurrency", type=int, default=64, help="calls in flight for each engine")


def open_model(given: argparse.Namespace) -> Model:
    """The model that `add_model_flags` describes. Raises DataError; RequestError when an engine does not answer."""
    for flag, value in (("--concurrency", given.concurrency), ("--timeout", given.timeout)):
        if value <= 0:
            raise DataError(f"{flag} {value}: a number above 0 is needed")
    if given.model is not None:
        return local_model(given.model, given.dtype, given.tokenizer)
    refuse_unused(given, add_model_flags, ("--dtype",), "with --url")
    if not given.tokenizer:
        raise DataError("--url needs --tokenizer, the HF folder of the model that the engines serve")
    tokenizer = load_tokenizer(given.tokenizer)
    name, identity = served_identity(given.url)
    return Model(name, tokenizer, None, identity | {"tokenizer": tokenizer_key(tokenizer)})


def local_model(model: Path, dtype: str, tokenizer_folder: str | None = None) -> Model:
    """That in an HF folder, or the latest of a checkpoint folder, exported once (`exported_model`). Raises DataError."""
    if is_hf_folder(model):
        folder, step, key = model, None, weights_key(model)
    else:
        export = exported(model)
        folder, step, key = export.folder, export.step, export.key
    tokenizer = load_tokenizer(tokenizer_folder or str(folder))
    identity = {"weights": key, "dtype": served_dtype(folder, dtype), "tokenizer": tokenizer_key(tokenizer)}
    return Model(str(model), tokenizer, folder, identity, step)


def served_identity(urls: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(path, identity) of the model that running engines say they serve, wherever they listen.

    Raises DataError when they serve different ones; RequestError.
    """
    found = []
    for url in urls:
        model: Any = call(url.rstrip("/"), "GET", "/model_info", timeout_s=CALL_S)
        server: Any = call(url.rstrip("/"), "GET", "/server_info", timeout_s=CALL_S)
        if not isinstance(model, dict) or not isinstance(server, dict) or "model_path" not in model:
            raise DataError(f"--url {url}: no SGLang engine, its /model_info has no model_path")
        path = str(model["model_path"])
        files = weights_key(Path(path)) if Path(path).is_dir() else "files elsewhere"
        identity = {"weights": f"{path}, {model.get('weight_version')}, {files}"}
        identity |= {name: str(server.get(name)) for name in ("dtype", "quantization", "kv_cache_dtype")}
        found.append((path, identity))
    for url, one in zip(urls, found, strict=True):
        if one != found[0]:
            raise DataError(f"--url {urls[0]} serves {found[0][1]}, {url} {one[1]}: name engines of one model")
    return found[0]


@contextlib.contextmanager
def engines_of(model: Model, given: argparse.Namespace, output: Path, context: int) -> Iterator[list[str]]:
    """URLs of engines that serve the model, started here unless they run; `context`: most tokens of a prompt and its answer."""
    if model.folder is None:
        yield given.url
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_name(output.name + ".server.log")
    seed = getattr(given, "seed", 0)
    settings = ServerSettings(
        model.folder, given.dtype, context_length=context + ENGINE_MARGIN, seed=seed, log_file=log
    )
    with LocalServer(settings) as server:
        yield [server.url]


def pool_settings(given: argparse.Namespace, vocab_size: int) -> PoolSettings:
    """How the engines are asked."""
    return PoolSettings(
        call_timeout_s=given.timeout,
        deadline_s=3 * given.timeout,
        max_concurrency=given.concurrency,
        vocab_size=vocab_size,
    )


def load_tokenizer(folder: str) -> Any:
    """Raises DataError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no tokenizer there: {error}") from error


def tokenizer_key(tokenizer: Any) -> str:
    """Equal for tokenizers that make the same ids of texts."""
    return DocumentEncoder.of(tokenizer, TokenizeSettings(append_eos=False)).fingerprint()[:20]


def exported(model: Path) -> Export:
    """The HF export of a run's latest checkpoint. Raises DataError: it is no checkpoint folder, or cannot be converted."""
    if not (model / TRACKER).is_file():
        raise DataError(
            f"--model {model}: neither an HF folder (config.json) nor a checkpoint folder ({TRACKER}); a run's checkpoints lie "
            f"in its --save folder, its exported model in {HF_SUBFOLDER}/"
        )
    try:
        return exported_model(model)
    except ValueError as error:
        raise DataError(f"--model {model}: {error}") from error
