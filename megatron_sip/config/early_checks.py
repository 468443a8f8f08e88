"""The command line before anything slow is imported: help, and every mistake in it at once.

Our own flags are parsed and checked in full. Of Megatron's, whose parser takes torch and several seconds to build, those
in MEGATRON_FLAGS are parsed too; of all others the name is looked up in Megatron's source. What is left for Megatron's
parser to refuse are values of its rarer flags, and what does not fit together among them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sip.checkpoints.folder import TRACKER, require_checkpoint
from megatron_sip.config.checks import missing_flags, problems_of_ours, refuse
from megatron_sip.config.flags import add_arguments
from megatron_sip.config.held_out import suites_of
from megatron_sip.config.parse import SAVE_INTERVAL, StrictParser, find_hf_config
from megatron_sip.data.documents import OWN_SPLITS
from megatron_sip.data.role_corpus import role_paths
from megatron_sip.data.roles import Split
from megatron_sip.data.source_files import parse_data_path
from megatron_sip.errors import ArgumentError, DataError
from megatron_sip.hf.converted import is_hf_folder

PROGRAM = "python -m megatron_sip.train"

MEGATRON_FLAGS: dict[str, dict[str, Any]] = {
    "--data-path": {
        "nargs": "*",
        "metavar": "FILE",
        "help": "Text (jsonl, parquet) or .bin/.idx, optionally weighted.",
    },
    "--split": {"metavar": "N,N,N", "help": "Shares of documents for train, valid, test; 969,30,1 unless given."},
    "--save": {"metavar": "DIR", "help": "Folder of the run's checkpoints; a run there is continued."},
    "--pretrained-checkpoint": {
        "metavar": "DIR",
        "help": "The policy's initial weights: a converted checkpoint, or an HF folder, which is then converted once and kept "
        "in ~/.cache/megatron_sip/checkpoints. Without: random weights.",
    },
    "--seq-length": {"type": int, "metavar": "TOKENS", "help": "The most tokens of a prefix and its suffix together."},
    "--global-batch-size": {"type": int, "metavar": "N", "help": "Prompts a step."},
    "--train-iters": {"type": int, "metavar": "STEPS", "help": "Steps."},
    "--save-interval": {"type": int, "metavar": "STEPS", "help": "Steps between checkpoints."},
    "--eval-interval": {
        "type": int,
        "metavar": "STEPS",
        "help": "Steps between two measurements on held-out records or documents (--eval-suites); none unless given.",
    },
    "--lr": {"type": float, "help": "Learning rate."},
    "--min-lr": {"type": float, "help": "Where its decay ends."},
    "--lr-decay-style": {"help": "constant, linear, cosine, inverse-square-root or WSD."},
    "--lr-warmup-iters": {"type": int, "metavar": "STEPS", "help": "Steps in which it rises to --lr."},
    "--seed": {"type": int, "help": "Of cuts, sampling and judgements."},
    "--bf16": {"action": "store_true", "help": "Train in bfloat16."},
    "--tensor-model-parallel-size": {"type": int, "metavar": "N", "help": "GPUs that share each layer."},
    "--pipeline-model-parallel-size": {"type": int, "metavar": "N", "help": "GPUs that the layers are spread over."},
    "--use-distributed-optimizer": {"action": "store_true", "help": "Spread the optimizer's state over the replicas."},
    "--tensorboard-dir": {"metavar": "DIR", "help": "Log to tensorboard."},
    "--wandb-project": {"metavar": "NAME", "help": "Log to wandb, offline where nobody is logged in."},
}
"""Megatron's flags that most runs give, for help and early errors; without a metavar's or a type's difference to its own."""
MEGATRON_DEFAULTS = {
    "--save-interval": SAVE_INTERVAL,
    "--min-lr": 0.0,
    "--lr-decay-style": "linear",
    "--lr-warmup-iters": 0,
    "--seed": 1234,
    "--tensor-model-parallel-size": 1,
    "--pipeline-model-parallel-size": 1,
}
"""As they are in our runs."""
MEGATRON_CONFIGS = ("core/transformer/transformer_config.py", "core/model_parallel_config.py", "core/fault_injector.py")
"""Dataclasses outside training/config/ whose fields become flags of Megatron's."""
LITERAL_FLAG = re.compile(r"""["'](--[A-Za-z0-9][\w-]*)["']""")


def check_flags(given: Sequence[str]) -> argparse.Namespace:
    """Our flags and MEGATRON_FLAGS of a command line without presets; prints the help and exits when that is asked for.

    Raises:
        ArgumentError: lists everything that is wrong.
    """
    parser = early_parser()
    if any(word in ("-h", "--help") for word in given):
        parser.print_help()
        raise SystemExit(0)
    args, problems = _parse_leniently(parser, given)
    if args.help_megatron:
        return args
    named = {word.rstrip(":") for problem in problems for word in problem.split()}  # given, if wrongly
    problems += [problem for problem in missing_flags(args) if problem.split()[0] not in named]
    refuse([*problems, *problems_of_ours(args), *missing_files(args)])
    return args


def missing_files(args: argparse.Namespace) -> Iterator[str]:
    """What the flags name and is not there: the policy's folder, and unless only the cost is asked for weights and texts."""
    try:
        find_hf_config(args.hf_config, args.pretrained_checkpoint)
        start, resumes = args.pretrained_checkpoint, args.save and (Path(args.save) / TRACKER).exists()
        if start and not resumes and not args.dry_run and not is_hf_folder(Path(start)):
            require_checkpoint(Path(start))
    except (ArgumentError, DataError) as error:
        yield str(error)
    try:
        if args.data_path and not args.dry_run:
            splits: tuple[Split, ...] = ("train", "test") if args.win_rate_prompts or suites_of(args) else ("train",)
            for split in splits if args.subset is not None else ("train",):
                paths = args.data_path if args.subset is None else role_paths(args.data_path, args.subset, split)
                parse_data_path(paths)
    except DataError as error:
        yield str(error)
    if args.subset is not None and args.split is not None:
        yield OWN_SPLITS.format(split=args.split)


def early_parser() -> argparse.ArgumentParser:
    """Our flags and MEGATRON_FLAGS, with their defaults in the help."""
    parser = StrictParser(
        PROGRAM, usage=f"{PROGRAM} [flags]", allow_abbrev=False, add_help=False, formatter_class=_WithDefaults
    )
    parser.add_argument("-h", "--help", action="store_true", help="Show this, and exit.")
    parser.add_argument("--help-megatron", action="store_true", help="Show all other flags, which are Megatron's.")
    group = parser.add_argument_group("Megatron's flags that most runs give (--help-megatron shows all)")
    for flag, settings in MEGATRON_FLAGS.items():
        group.add_argument(flag, **settings, **_default(flag))
    return add_arguments(parser)


def _default(flag: str) -> dict[str, Any]:
    return {"default": MEGATRON_DEFAULTS[flag]} if flag in MEGATRON_DEFAULTS else {}


class _WithDefaults(argparse.HelpFormatter):
    """Adds the default to a help text that does not speak of it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS) or "efault" in text:
            return text
        values = action.default if isinstance(action.default, list | tuple) else [action.default]
        return f"{text} [default: {' '.join(map(str, values)).replace('%', '%%')}]"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else "NUMBER" if action.type is float else "TEXT"


def words_by_flag(given: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A command line as (flag, its values), in order; words before the first flag come under an empty one."""
    found: list[tuple[str, list[str]]] = []
    for word in given:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    return found


def _parse_leniently(parser: argparse.ArgumentParser, given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(what could be parsed, what is wrong with the rest)"""
    ours = {name for action in parser._actions for name in action.option_strings}
    good: list[str] = []
    problems = []
    for flag, values in words_by_flag(given):
        if not flag:
            problems.append(f"{values[0]!r} stands before the first flag")
        elif flag in ours:
            words = [flag, *values]
            try:
                parser.parse_args(words)
                good += words
            except ArgumentError as error:
                problems.append(_worded(str(error), flag))
        elif flag not in megatron_flag_names():
            problems.append(f"{flag}: there is no such flag{nearest(flag, ours)}")
    return parser.parse_args(good), problems


def _worded(message: str, flag: str) -> str:
    """argparse's message, beginning with the flag."""
    stray = message.removeprefix("unrecognized arguments: ")
    return message if stray == message else f"{flag}: unexpected {stray!r} after it"


def nearest(flag: str, ours: set[str]) -> str:
    """A question with the existing flag that is most like `flag`; nothing when none is."""
    known = [*sorted(ours), *sorted(megatron_flag_names(spelt_out=True) - ours)]
    found = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
    return f"; is {found[0]} meant?" if found else " (--help and --help-megatron list them)"


@cache
def megatron_flag_names(spelt_out: bool = False) -> frozenset[str]:
    """Names that Megatron's parser may know, read from its source: all that it knows, and some more.

    Its flags are literals of training/arguments.py and fields of dataclasses; what of the latter are switches that are on
    becomes --no-NAME and --disable-NAME, so these are counted for every field, but for those asked for `spelt_out`.
    """
    root = megatron_folder()
    configs = [*sorted((root / "training" / "config").glob("*.py")), *(root / name for name in MEGATRON_CONFIGS)]
    literals = {name for path in [root / "training" / "arguments.py", *configs] for name in _literals(path)}
    fields = {name for path in configs for name in _field_flags(path)}
    if spelt_out:
        return frozenset(literals | fields)
    off = {f"--{no}-{name.removeprefix('--')}" for name in literals | fields for no in ("no", "disable")}
    return frozenset(literals | fields | off)


def megatron_folder() -> Path:
    """Where Megatron is installed; found without importing it."""
    spec = importlib.util.find_spec("megatron")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _literals(path: Path) -> list[str]:
    return LITERAL_FLAG.findall(path.read_text(encoding="utf-8"))


def _field_flags(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield "--" + line.target.id.replace("_", "-")
