"""run.json of a run folder: the command that continues the run, and its settings, for the report.

The settings are the flags given (presets expanded, the last of each) whose values are not the defaults. No flag holds a
secret: keys come from the environment, and URLs with passwords are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sip.config.early_checks import early_parser, words_by_flag
from megatron_sip.files import write_atomically

FILE = "run.json"
RANDOM = "random"
"""As `initial_weights`."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """command: continues the run. settings: flag -> its values in a line. initial_weights: a checkpoint, or RANDOM. processes:
    of the trainer, on all nodes; None in records of earlier versions."""

    command: str
    settings: dict[str, str]
    initial_weights: str
    processes: int | None = None


def run_record(given: Sequence[str], flags: argparse.Namespace, environment: Mapping[str, str]) -> RunRecord:
    """The record of a command line: as it is written in `given`, and as `early_checks.check_flags` read it."""
    return RunRecord(
        command=flags.started_as or continuing_command(given, environment),
        settings=changed_settings(given, flags),
        initial_weights=flags.pretrained_checkpoint or RANDOM,
        processes=int(environment.get("WORLD_SIZE", "1")),
    )


def changed_settings(given: Sequence[str], flags: argparse.Namespace) -> dict[str, str]:
    """The flags of `given` that say something else than their defaults, in order."""
    parser = early_parser()
    defaults = {name: (a.dest, a.default) for a in parser._actions for name in a.option_strings}
    settings = {flag: shlex.join(values) for flag, values in words_by_flag(given)}
    same = {flag for flag, (dest, default) in defaults.items() if getattr(flags, dest, None) == default}
    return {flag: value for flag, value in settings.items() if flag not in same and flag != "--started-as"}


def continuing_command(given: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The command line of this process, or of the torchrun that started it."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return shlex.join(["python", "-m", "megatron_sip.train", *given])
    processes = environment.get("LOCAL_WORLD_SIZE", "1")
    nodes = int(environment.get("WORLD_SIZE", "1")) // int(processes)
    launcher = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc-per-node", processes]
    return shlex.join([*launcher, "-m", "megatron_sip.train", *given])


def write_run_record(run_dir: Path, record: RunRecord) -> None:
    """Write run.json; the last start's stays."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / FILE, json.dumps(asdict(record), indent=2, ensure_ascii=False) + "\n")


def read_run_record(run_dir: Path) -> RunRecord | None:
    """run.json, or None where there is none (runs of earlier versions) or a foreign one."""
    try:
        record = RunRecord(**json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if isinstance(record.settings, dict) else None
