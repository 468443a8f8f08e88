"""The model that is evaluated: an HF folder or a run's checkpoint, served on this node, or engines that serve it already."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.errors import DataError
from megatron_sip.files import move_into_place
from megatron_sip.hf.folder import HF_SUBFOLDER
from megatron_sip.rollout.pool import PoolSettings
from megatron_sip.serving.guard import own_environment
from megatron_sip.serving.launch import LocalServer, ServerSettings
from megatron_sip.serving.local_servers import ENGINE_MARGIN


@dataclass(frozen=True, slots=True)
class Model:
    """A model before it is served. folder: its weights, None where running engines have them. step: of a run's checkpoint."""

    name: str
    tokenizer: Any
    folder: Path | None
    step: str | None = None

    def header(self) -> dict[str, str]:
        """What a file of its generations, and of results about it, says of it."""
        return {"model": self.name} | ({} if self.step is None else {"step": self.step})


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and how its engines are reached or started."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="an HF folder, or a checkpoint folder of a run; served on this node")
    model.add_argument("--url", nargs="+", help="running SGLang engines that serve the model; needs --tokenizer")
    parser.add_argument("--tokenizer", help="HF folder of the model's tokenizer, with --url")
    parser.add_argument("--dtype", default="auto", help="number format of a served --model")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one call")
    parser.add_argument("--concurrency", type=int, default=64, help="calls in flight for each engine")


def open_model(given: argparse.Namespace, output: Path) -> Model:
    """The model that `add_model_flags` describes; a run's checkpoint is exported beside `output`. Raises DataError."""
    if given.url and not given.tokenizer:
        raise DataError("--url needs --tokenizer, the HF folder of the model that the engines serve")
    if given.model is None:
        return Model(given.url[0], load_tokenizer(given.tokenizer), None)
    folder = hf_folder(given.model, output)
    step = folder.name.rpartition("_")[2] if folder != given.model else None
    return Model(str(given.model), load_tokenizer(given.tokenizer or str(folder)), folder, step)


@contextlib.contextmanager
def engines_of(model: Model, given: argparse.Namespace, output: Path, context: int) -> Iterator[list[str]]:
    """URLs of engines that serve the model, started here unless they run; `context`: most tokens of a prompt and its answer."""
    if model.folder is None:
        yield given.url
        return
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
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def hf_folder(model: Path, output: Path) -> Path:
    """`model` itself where it is an HF folder; of a run's latest checkpoint an HF export beside `output`, made once.

    Raises:
        DataError: neither of the two, or the checkpoint cannot be converted.
    """
    if not (model / TRACKER).is_file():
        if (model / "config.json").is_file():
            return model
        raise DataError(
            f"--model {model}: neither an HF folder (config.json) nor a checkpoint folder ({TRACKER}); a run's checkpoints lie "
            f"in its --save folder, its exported model in {HF_SUBFOLDER}/"
        )
    step = (model / TRACKER).read_text().strip()
    exported = output.with_name(f"{output.name}.hf_{step}")
    if exported.exists():
        return exported
    staged = exported.with_name(f".{exported.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    staged.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_sip.hf.convert", "megatron-to-hf", "--load", str(model)]
    done = subprocess.run(
        [*command, "--save", str(staged)], env=own_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(f"--model {model}: {(done.stderr or done.stdout).strip()[-2000:]}")
    if (model / TRACKER).read_text().strip() != step:
        raise DataError(
            f"--model {model}: its run saved another step meanwhile: give the command again when it has ended"
        )
    move_into_place(staged, exported)
    return exported
