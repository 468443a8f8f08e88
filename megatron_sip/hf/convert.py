"""Convert a model between a Hugging Face folder and a Megatron distributed checkpoint.

    megatron-sip-convert hf-to-megatron --load HF_DIR --save CKPT_DIR
    megatron-sip-convert megatron-to-hf --load CKPT_DIR --save HF_DIR

One process does; for a model larger than its memory split it with torchrun, for example
`torchrun --nproc-per-node 8 -m megatron_sip.hf.convert ... --tensor-model-parallel-size 4
--pipeline-model-parallel-size 2`. The checkpoint does not depend on that: it loads at any parallel size, with
`--pretrained-checkpoint CKPT_DIR`.

CKPT_DIR/hf/ keeps the HF config and tokenizer; megatron-to-hf takes them from there, or from --hf-dir. Llama 2 and 3,
SmolLM2, Qwen2 and Qwen3 convert without loss of a bit: hf-to-megatron says where the config's dtype is narrower than the
weights, megatron-to-hf writes the checkpoint's own unless --dtype names another.

A Megatron checkpoint holds pickles: whoever reads one runs the code in it, this command and the trainer included. Read
only those that you or people you trust have written. Safetensors hold nothing but numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_sip import console
from megatron_sip.checkpoints.checksums import damages, write_checksums
from megatron_sip.checkpoints.folder import TRACKER, weights_folder
from megatron_sip.console import quiet
from megatron_sip.errors import UserError
from megatron_sip.files import read_json, write_atomically
from megatron_sip.hf.families import architecture
from megatron_sip.hf.files import checked_tensors, read_hf_config, rounding
from megatron_sip.hf.folder import HF_SUBFOLDER, refuse_pointers, write_model_files
from megatron_sip.hf.shards import complete_model, write_parts
from megatron_sip.hf.standalone import PRECISION_FLAGS, build_policy, initialize_megatron_for, precision_of
from megatron_sip.platform.megatron import prepare_megatron

PROGRAM = "megatron-sip-convert"
PREFIX = f"{PROGRAM}: "
MAX_SHARD_BYTES = 5_000_000_000


class ConversionError(UserError):
    """The folders named on the command line cannot be converted; the message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be converted into what: `hf_dir` has config and tokenizer where they are not beside the checkpoint."""

    load: Path
    save: Path
    hf_dir: Path | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says; a line on stderr and exit status 1 when that cannot be."""
    given = command_line().parse_args(argv)
    conversion = Conversion(
        given.load,
        given.save,
        given.hf_dir,
        given.tensor_model_parallel_size,
        given.pipeline_model_parallel_size,
        given.dtype,
    )
    convert = {"hf-to-megatron": hf_to_megatron, "megatron-to-hf": megatron_to_hf}[given.direction]
    with torch.no_grad(), contextlib.nullcontext() if given.verbose else quiet(None):
        try:
            convert(conversion)
            say(f"wrote {conversion.save}")
        except (ConversionError, OSError, ValueError, SafetensorError) as error:
            sys.exit(f"{PREFIX}{error}")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def command_line() -> argparse.ArgumentParser:
    """The parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=("hf-to-megatron", "megatron-to-hf"))
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="the checkpoint to read")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="a new or empty folder to write")
    parser.add_argument("--hf-dir", type=Path, metavar="DIR", help="config and tokenizer; default: --load's hf/ folder")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="needs torchrun if > 1")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="the same")
    parser.add_argument(
        "--dtype",
        choices=sorted(str(dtype).removeprefix("torch.") for dtype in PRECISION_FLAGS),
        help="of megatron-to-hf's weights; default: the checkpoint's. What a small learning rate taught in float32 is lost in "
        "bfloat16",
    )
    parser.add_argument("--verbose", action="store_true", help="show what Megatron prints, too")
    return parser


def hf_to_megatron(conversion: Conversion) -> None:
    """Write a torch_dist checkpoint without optimizer state, and hf/ beside it.

    Raises:
        ConversionError: --load is no HF folder, or --save already holds a checkpoint.
        OSError, ValueError: a file is missing or not whole, config and weights do not fit together, or the architecture or
            one of its options is not supported.
    """
    load, save = conversion.load, conversion.save
    hf_config = hf_config_of(load, "--load")
    check_new(save)
    stored = checked_tensors(load, hf_config)  # before Megatron is imported
    say(rounding(stored, precision_of(hf_config)))
    saving = ("--save", str(save), "--save-interval", "1", "--no-save-optim", "--no-save-rng")
    initialize(hf_config, conversion, *saving)
    from megatron.training.checkpointing import save_checkpoint

    from megatron_sip.hf.weights import load_hf_weights

    model = build_policy()
    load_hf_weights(model, load)
    if dist.get_rank() == 0:
        write_model_files(load, save / HF_SUBFOLDER)
    save_checkpoint(0, model, None, None, 0, release=True)  # its last act is the file that marks it complete
    write_checksums(weights_folder(save), dist.get_rank())


def megatron_to_hf(conversion: Conversion) -> None:
    """Write safetensors, config and tokenizer.

    Raises:
        ConversionError: --load is no Megatron checkpoint, no HF config is found, or --save is not empty.
        OSError, ValueError: the architecture or one of its options is not supported, or is not the checkpoint's.
    """
    load, save = conversion.load, conversion.save
    if not (load / TRACKER).is_file():
        raise ConversionError(f"--load {load} is no Megatron checkpoint folder: it has no {TRACKER}")
    processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if found := damages(weights_folder(load), *processes):
        raise ConversionError(f"--load {load} is damaged: {'; '.join(found)}")
    hf_dir = conversion.hf_dir or load / HF_SUBFOLDER
    hf_config = hf_config_of(hf_dir, "--hf-dir" if conversion.hf_dir else "the hf/ folder of --load (or give --hf-dir)")
    check_new(save)
    prepare_megatron()
    from megatron_sip.hf.checkpoint_model import describe_rounding, require_same_model

    saved = require_same_model(load, architecture(hf_config), f"{hf_dir}/config.json")
    own = getattr(saved, "params_dtype", None) or precision_of(hf_config)
    hf_config.dtype = own if conversion.dtype is None else getattr(torch, conversion.dtype)
    say(describe_rounding(own, hf_config.dtype))
    initialize(hf_config, conversion, "--load", str(load), "--finetune", "--no-load-optim", "--no-load-rng")
    from megatron.training.checkpointing import load_checkpoint

    from megatron_sip.hf.weights import export_hf_weights

    model = build_policy()
    load_checkpoint(model, None, None)
    save.mkdir(parents=True, exist_ok=True)
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        by_rank,
        write_parts(export_hf_weights(model, hf_config), save, str(dist.get_rank()), MAX_SHARD_BYTES),
    )
    if dist.get_rank() == 0:
        write_config(hf_dir / "config.json", save, hf_config.dtype)
        complete_model(save, [part for parts in by_rank for part in parts], hf_dir)


def write_config(template: Path, folder: Path, dtype: torch.dtype) -> None:
    """The config of a model of this dtype, else as it is in `template`."""
    config = read_json(template, "a model's config")
    config.pop("torch_dtype", None)  # as earlier versions of transformers call it
    text = json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2) + "\n"
    write_atomically(folder / "config.json", text)


def say(note: str | None) -> None:
    """Tell the user once, whatever the number of processes."""
    if note and int(os.environ.get("RANK", "0")) == 0:
        console.say(f"{PREFIX}{note}")


def initialize(hf_config: Any, conversion: Conversion, *flags: str) -> None:
    """Initialise Megatron with the command line's parallel sizes; ConversionError when the processes do not fit."""
    needed = conversion.tensor_parallel * conversion.pipeline_parallel
    sizes = ["--tensor-model-parallel-size", str(conversion.tensor_parallel)]
    sizes += ["--pipeline-model-parallel-size", str(conversion.pipeline_parallel)]
    if needed > 1 and not dist.is_torchelastic_launched():
        raise ConversionError(f"the parallel sizes need {needed} processes: torchrun --nproc-per-node {needed} ...")
    initialize_megatron_for(hf_config, [*sizes, *flags])


def hf_config_of(folder: Path, flag: str) -> Any:
    """The folder's config; ConversionError, naming the flag, when there is none."""
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder}/config.json does not exist: {flag} must be a Hugging Face model folder")
    refuse_pointers(folder)
    return read_hf_config(folder)


def check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"--save {folder} already holds files: name a new folder, or empty it first")


if __name__ == "__main__":
    main()
