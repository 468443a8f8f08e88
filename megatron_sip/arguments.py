"""The flags of Self-Improving Pretraining, on top of Megatron's own strict parser.

`parse_arguments` reads and checks everything once; nothing changes the namespace afterwards except Megatron itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_sip.argument_checks import ArgumentError, check_required, explained, validate
from megatron_sip.judge_arguments import add_judge_flags, add_teacher_flags
from megatron_sip.model.converted import converted_checkpoint, is_hf_folder
from megatron_sip.model.hf_folder import HF_SUBFOLDER, refuse_pointers
from megatron_sip.presets import expand_presets
from megatron_sip.samples import CANDIDATE_KINDS
from megatron_sip.server_arguments import add_server_flags
from megatron_sip.wandb_run import continue_wandb_run

GROUP_TITLE = "self-improving pretraining"
SAVE_INTERVAL = 100
"""Default of --save-interval, which Megatron does not have; the last step is always saved."""
REFUSED = "these flags cannot work (--help and --help-megatron explain each)"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser, in groups of their own."""

    def section(name: str) -> argparse._ArgumentGroup:
        return parser.add_argument_group(title=f"{GROUP_TITLE}: {name}")

    _add_run_flags(section("the run"))
    _add_task_flags(section("policy and tasks"))
    _add_objective_flags(section("objective"))
    _add_rollout_flags(section("rollouts and local servers"))
    group = section("teacher")
    group.add_argument("--teacher-model", metavar="DIR", help="Start an SGLang server of this HF model on this node.")
    add_teacher_flags(group)
    group = section("another server for the rewriter, or for the held-out judge")
    group.add_argument(
        "--rewriter-model", metavar="DIR", help="Start an SGLang server of this HF model on this node for the rewriter."
    )
    add_server_flags(group, "rewriter")
    add_server_flags(group, "eval_judge")
    add_judge_flags(section("judge"))
    return parser


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


def _add_task_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hf-config",
        metavar="DIR",
        help="HF folder with config.json and tokenizer of the policy: gives the architecture flags and the tokenizer, and "
        "is what the engines serve. Default: --pretrained-checkpoint, or the folder hf/ inside, which the converter writes.",
    )
    group.add_argument(
        "--suffix-length", type=int, default=128, metavar="N", help="Tokens of a suffix, a rewrite and a rollout."
    )
    group.add_argument(
        "--task-mode",
        choices=["random", "stream"],
        default="random",
        help="random: one seeded cut a document and epoch. stream: every chunk of --suffix-length tokens in turn.",
    )
    group.add_argument(
        "--min-prefix-length", type=int, default=16, metavar="N", help="Shortest prefix that a document is cut into."
    )
    group.add_argument("--text-field", default="text", help="Field of jsonl and parquet records that holds the text.")
    group.add_argument(
        "--prepend-bos",
        choices=["auto", "on", "off"],
        default="auto",
        help="Begin documents with the tokenizer's BOS. auto: if the tokenizer puts one before plain text, as for Llama 3.",
    )
    group.add_argument(
        "--row-length",
        type=int,
        default=None,
        metavar="TOKENS",
        help="Longest packed row (micro-batch). Several groups share a row. Default: just enough for one full group, "
        "--seq-length, and --suffix-length more when the objective is dpo.",
    )


def _add_objective_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--objective",
        choices=["sft", "rf-nll", "dpo"],
        default="dpo",
        help="sft: NLL of --sft-target. rf-nll: NLL of the best-judged candidate. dpo: online DPO, best against worst.",
    )
    group.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATE_KINDS,
        default=["suffix", "rollout"],
        metavar="KIND",
        help="Kinds of candidates that are judged: suffix, rewrite, rollout.",
    )
    group.add_argument(
        "--sft-target", choices=CANDIDATE_KINDS, default="suffix", help="What --objective sft learns; asks no judge."
    )
    group.add_argument(
        "--dpo-pair",
        nargs=2,
        choices=CANDIDATE_KINDS,
        default=None,
        metavar=("CHOSEN", "REJECTED"),
        help="Fix the roles of the DPO pair by kind and ask no judge, e.g. --dpo-pair rewrite rollout.",
    )
    group.add_argument("--dpo-beta", type=float, default=0.1, help="DPO's temperature on the log-ratio margin.")
    group.add_argument("--dpo-nll-coef", type=float, default=0.0, help="Weight of an NLL term on the chosen branch.")
    group.add_argument("--dpo-label-smoothing", type=float, default=0.0, help="Assumed rate of flipped preferences.")
    group.add_argument("--dpo-loss", choices=["sigmoid", "ipo"], default="sigmoid", help="Shape of the pair loss.")
    group.add_argument(
        "--ref-update-interval",
        type=int,
        default=0,
        metavar="STEPS",
        help="Copy the policy into the DPO reference every so many steps; 0 keeps the initial policy for ever.",
    )
    group.add_argument(
        "--logit-chunk-columns",
        type=int,
        default=0,
        metavar="N",
        help="Hold the logits of N vocabulary entries at a time (8192 is good) and compute them again in backward: slower, "
        "for when the logits of a row's branches do not fit. 0: all at once.",
    )
    group.add_argument(
        "--ref-offload",
        action="store_true",
        help="Keep the DPO reference's weights in pinned host memory and swap them in for its pass: saves one copy of the "
        "weights on the GPU.",
    )


def _add_rollout_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-rollouts", type=int, default=16, metavar="K", help="Rollouts of the policy per prefix.")
    group.add_argument("--rollout-temperature", type=float, default=1.0, help="0 is greedy.")
    group.add_argument("--rollout-top-p", type=float, default=1.0, help="Nucleus of the rollouts' sampling.")
    group.add_argument(
        "--rollout-start-step",
        type=int,
        default=0,
        metavar="STEP",
        help="Before this step only suffix and rewrite are candidates (early rollouts of a fresh policy are noise).",
    )
    group.add_argument("--rollout-url", nargs="+", metavar="URL", help="Running SGLang engines that serve the policy.")
    group.add_argument(
        "--rollout-key-variable",
        default=None,
        metavar="NAME",
        help="Environment variable that holds the key which the engines demand (SGLang's --api-key).",
    )
    group.add_argument(
        "--rollout-local", type=int, default=0, metavar="N", help="Start N SGLang engines on this node instead."
    )
    group.add_argument("--rollout-timeout", type=float, default=600.0, metavar="SECONDS", help="For one engine call.")
    group.add_argument(
        "--rollout-concurrency",
        type=int,
        default=256,
        metavar="CALLS",
        help="Calls in flight of each data-parallel replica.",
    )
    _add_local_server_flags(group)
    _add_weight_sync_flags(group)


def _add_local_server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--local-engine-dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="Number format of the servers that --rollout-local and --teacher-model start.",
    )
    group.add_argument(
        "--local-engine-tokens",
        type=int,
        default=None,
        metavar="TOKENS",
        help="Size of a local server's KV cache. Default: SGLang's choice with a GPU, 32768 without.",
    )
    group.add_argument(
        "--local-server-memory",
        type=float,
        default=None,
        metavar="SHARE",
        help="What each local server takes of a GPU's memory; servers then share the GPUs behind the trainer's, or its last "
        "one. Default: a GPU a server.",
    )


def _add_weight_sync_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--weight-sync",
        choices=["distributed", "disk"],
        default="distributed",
        help="distributed: broadcast buckets to the engines (NCCL, or gloo without GPUs). disk: through --weight-sync-dir.",
    )
    group.add_argument(
        "--weight-sync-dir", metavar="DIR", help="Folder that trainer and engines share. Default: RUN_DIR/weights."
    )
    group.add_argument("--weight-sync-bucket-mb", type=int, default=512, metavar="MB", help="Size of one broadcast.")
    group.add_argument(
        "--max-staleness",
        type=int,
        choices=[0],
        default=0,
        help="Optimizer steps that the engines' weights may be behind; 0 is strictly on-policy.",
    )


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--preset", metavar="NAME|FILE", help="Flags of a file, see docs/presets.md; flags after it win over its own."
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="Show on the screen what Megatron and others print, not in RUN_DIR/logs/.",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="Say what the flags mean and cost in calls and tokens, and exit."
    )
    group.add_argument(
        "--run-dir",
        metavar="DIR",
        help="Folder for metrics.jsonl, samples, server logs, plots and summary.json. Default: the folder of --save.",
    )
    group.add_argument(
        "--started-as", metavar="COMMAND", help="What the report names as the command that continues the run."
    )
    group.add_argument(
        "--load-last-whole",
        action="store_true",
        help="When files of the latest checkpoint are damaged, move it aside and continue from the newest one that is whole.",
    )
    group.add_argument("--save-groups", metavar="DIR", help="Write every step's judged groups there, compressed.")
    group.add_argument(
        "--replay-groups",
        metavar="DIR",
        help="Train from groups written by --save-groups, without engines and teacher.",
    )
    group.add_argument(
        "--win-rate-prompts",
        type=int,
        default=0,
        metavar="N",
        help="At the end compare the trained policy with the initial one on N held-out prefixes; 0 skips it.",
    )
    group.add_argument(
        "--win-rate-temperature", type=float, default=0.0, help="Sampling of the compared continuations; 0 is greedy."
    )


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
    from megatron_sip.platform.megatron_cpu import cpu_default_arguments

    given = expand_presets(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] == "--yaml-cfg" for word in given):  # Megatron would read the file in place of all flags
        raise ArgumentError(
            "--yaml-cfg: flags come from the command line, or from a file with --preset FILE; remove it"
        )
    sys.argv = [sys.argv[0], *cpu_default_arguments(), *_implied_by_model(given), *given]
    with explained(REFUSED):
        args = parse_args(_with_ours)
    check_required(args)
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
    from megatron_sip.model.hf_families import megatron_arguments_from_hf
    from megatron_sip.model.hf_files import read_hf_config

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
        hint = "convert the model with tools/convert_checkpoint.py hf-to-megatron, or give --hf-config"
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
    from megatron_sip.model.checkpoint_model import differing
    from megatron_sip.model.hf_families import architecture
    from megatron_sip.model.hf_files import read_hf_config

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
