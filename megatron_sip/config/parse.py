"""From the command line to a namespace: Megatron's own strict parser with our flags on top.

`parse_arguments` reads and checks everything once; nothing changes the namespace afterwards except Megatron itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_sip.config.checks import check_required, explained, validate
from megatron_sip.config.flags import add_arguments
from megatron_sip.config.presets import expand_presets
from megatron_sip.config.wandb_run import continue_wandb_run
from megatron_sip.console import say
from megatron_sip.errors import ArgumentError
from megatron_sip.hf.converted import converted_checkpoint, is_hf_folder
from megatron_sip.hf.folder import HF_SUBFOLDER, refuse_pointers

SAVE_INTERVAL = 100
"""Default of --save-interval, which Megatron does not have; the last step is always saved."""
REFUSED = "these flags cannot work (--help and --help-megatron explain each)"


def megatron_help() -> str:
    """The help of Megatron's own flags."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser("python -m megatron_sip.train", usage="%(prog)s [flags]", add_help=False)
    _escape_percent_signs(add_megatron_arguments(parser))
    return parser.format_help()


class StrictParser(argparse.ArgumentParser):
    """Raises ArgumentError where argparse prints pages of usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message.removeprefix("argument "))


def _with_ours(megatrons: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A strict parser of Megatron's flags and ours."""
    return add_arguments(StrictParser(parents=[megatrons], add_help=False, allow_abbrev=False))


def _escape_percent_signs(parser: argparse.ArgumentParser) -> None:
    """Mend help texts that argparse cannot format: one of Megatron 0.19.2's holds a bare %, and --help would raise."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError):
            action.help = (action.help or "").replace("%", "%%")
        except KeyError:
            continue  # names such as %(prog)s, which argparse adds itself


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check Megatron's flags and ours, and set Megatron's global state (arguments, tokenizer, writers).

    Defaults are filled from the policy's HF config (architecture, tokenizer) and, without a GPU, from what Megatron
    needs to run on CPU; flags on the command line win over both. With --dry-run Megatron's global state is left alone:
    its tensorboard and wandb writers would create files and runs.

    Raises:
        ArgumentError: flags that cannot work together, or a file they name that is not there.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_sip.model.gpt import check_arguments
    from megatron_sip.platform.megatron import machine_arguments

    given = expand_presets(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] == "--yaml-cfg" for word in given):  # Megatron would read the file in place of all flags
        raise ArgumentError(
            "--yaml-cfg: flags come from the command line, or from a file with --preset FILE; remove it"
        )
    sys.argv = [sys.argv[0], *machine_arguments(), *_implied_by_model(given), *given]
    with explained(REFUSED):
        args = parse_args(_with_ours)
    check_required(args)
    compute_in_float32_where_faster(args)
    with explained(REFUSED):
        validate_args(args)
        check_arguments(args)
    validate(args)
    require_model_of_config(args)
    if not args.dry_run:
        args.pretrained_checkpoint = checkpoint_to_start_from(args.pretrained_checkpoint)
        if args.wandb_project and args.rank == args.world_size - 1:
            keep_wandb_offline_without_login()
            with explained("--run-dir"):
                continue_wandb_run(Path(args.run_dir))
        with explained("tokenizer, tensorboard or wandb"):
            set_global_variables(args)
    return args


def compute_in_float32_where_faster(args: argparse.Namespace) -> None:
    """Take --bf16 back, and say so, on a processor that multiplies bfloat16 far slower than float32.

    A run that has begun goes on in the format of its checkpoint, wherever it is continued.
    """
    from megatron_sip.platform.number_format import bfloat16_pays
    from megatron_sip.training.resume import saved_run

    if not args.bf16:
        return
    saved = saved_run(Path(args.save))
    pays = bfloat16_pays()
    args.bf16_taken_back = not pays if saved is None else getattr(saved, "bf16_taken_back", False)
    if args.bf16_taken_back:
        args.bf16 = args.fp32_residual_connection = False  # the latter is so without the flag, and refused
    if args.rank == 0 and not pays:
        so = "so the run computes in float32" if args.bf16_taken_back else "but its checkpoint is of a run in bfloat16"
        say(f"--bf16: this processor multiplies bfloat16 many times slower than float32, {so}")


def keep_wandb_offline_without_login() -> None:
    """Let wandb write to disk where nobody is logged in: it would ask for a login in the middle of a batch job.

    A mode chosen by WANDB_MODE or in wandb's settings files stays. Asks no server.
    """
    import wandb

    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise ArgumentError(f"--wandb-project: {error}") from None
    if not known and "mode" not in wandb.setup().settings.model_fields_set:
        wandb.setup(settings=wandb.Settings(mode="offline"))


def _implied_by_model(given: Sequence[str]) -> list[str]:
    """Architecture and tokenizer flags of the policy's HF config, plus the settings every run of ours shares."""
    from megatron_sip.hf.families import megatron_arguments_from_hf
    from megatron_sip.hf.files import read_hf_config

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--hf-config")
    early.add_argument("--pretrained-checkpoint")
    known, _ = early.parse_known_args(given)
    folder = find_hf_config(known.hf_config, known.pretrained_checkpoint)
    with explained("the model's folder"):
        hf_config = read_hf_config(folder)
    with explained(f"{folder}/config.json"):
        architecture = megatron_arguments_from_hf(hf_config)
    return [
        *architecture,
        *("--hf-config", str(folder)),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)),
        # One packed row is a micro-batch, and the loss is divided by the step's global count of examples or tokens.
        *("--micro-batch-size", "1", "--calculate-per-token-loss"),
        # The trainer checks loss and gradient norm itself: Megatron's check expects a fixed number of micro-batches.
        *("--no-check-for-nan-in-loss-and-grad", "--rerun-mode", "disabled"),
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
        "--override-opt-param-scheduler",  # on resume the flags win over the checkpoint's schedule
        # A step of --fp16 is tried again at half the loss scale, and the loss is a sum: Megatron's 2**32 took it 20 trials.
        *("--initial-loss-scale", str(2**12), "--hysteresis", "1"),
        *("--ckpt-format", "torch_dist", "--save-interval", str(SAVE_INTERVAL)),
        # One engine that hangs in a push is given up after --rollout-timeout, while other ranks already wait in a collective.
        *("--distributed-timeout-minutes", "60"),
    ]


def find_hf_config(hf_config: str | None, pretrained_checkpoint: str | None) -> Path:
    """The folder with the policy's config.json and tokenizer.

    Raises:
        ArgumentError: neither flag leads to a folder with a config.json.
    """
    if hf_config is not None:
        folder = Path(hf_config)
        hint = "--hf-config must name a folder with config.json and the tokenizer"
    elif pretrained_checkpoint is not None:
        folder = Path(pretrained_checkpoint)
        if not is_hf_folder(folder):
            folder /= HF_SUBFOLDER
        hint = "convert the model with megatron-sip-convert hf-to-megatron, or give --hf-config"
    else:
        raise ArgumentError("--pretrained-checkpoint (continue) or --hf-config (from scratch) is required")
    if not (folder / "config.json").is_file():
        raise ArgumentError(f"{folder}/config.json does not exist: {hint}")
    with explained("the model's folder"):
        refuse_pointers(folder)
    return folder


def require_model_of_config(args: argparse.Namespace) -> None:
    """Refuse architecture flags that differ from the HF config, which engines and exported models go by.

    Raises:
        ArgumentError: names each flag with both values.
    """
    from megatron_sip.hf.checkpoint_model import differing
    from megatron_sip.hf.families import architecture
    from megatron_sip.hf.files import read_hf_config

    differences = differing(args, architecture(read_hf_config(Path(args.hf_config))))
    if differences:
        raise ArgumentError(
            f"{args.hf_config}/config.json is of another model than the flags ({', '.join(differences)}): the engines serve "
            "what it says; change it there, or remove the flags"
        )


def checkpoint_to_start_from(given: str | None) -> str | None:
    """--pretrained-checkpoint as Megatron can load it: a Hugging Face folder is converted, once.

    Raises:
        ArgumentError: the folder cannot be converted.
    """
    if given is None or not is_hf_folder(Path(given)):
        return given
    with explained(f"--pretrained-checkpoint {given}"):
        return str(converted_checkpoint(Path(given)))
