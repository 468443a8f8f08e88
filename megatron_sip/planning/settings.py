"""The trainer's own command line, and a run folder's, as settings to plan with."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config.early_checks import check_flags, words_by_flag
from megatron_sip.config.parse import find_hf_config
from megatron_sip.config.presets import expand_presets
from megatron_sip.config.settings import Settings
from megatron_sip.errors import ArgumentError
from megatron_sip.evaluation.run_record import FILE, read_run_record
from megatron_sip.planning.memory import Parallel
from megatron_sip.planning.shapes import ModelShape, read_shape

DEFAULTS = {
    "--save": "run",
    "--data-path": "text.jsonl",
    "--train-iters": "1",
    "--lr": "1e-5",
    "--seq-length": "2048",
    "--global-batch-size": "256",
}
"""Of flags that a run must have: folders that are not looked at, and what no preset leaves open."""


@dataclass(frozen=True, slots=True)
class Planable:
    """A command line of the trainer. parallel: its options; tensor, pipeline: as given, None for none."""

    settings: Settings
    policy: ModelShape
    parallel: Parallel
    tensor: int | None
    pipeline: int | None
    engines: int
    judges: int


def read_command(given: Sequence[str]) -> Planable:
    """What the trainer's flags say of a run, as a dry run reads them: no server is asked, no text is read.

    Raises:
        ArgumentError: lists everything that is wrong with the flags.
    """
    words = expand_presets(given)
    named = dict(words_by_flag(words))
    filled = [word for flag, value in DEFAULTS.items() if flag not in named for word in (flag, value)]
    flags = check_flags([*words, *filled, *([] if "--dry-run" in named else ["--dry-run"])])
    folder = find_hf_config(flags.hf_config, flags.pretrained_checkpoint)
    flags.hf_config, policy = str(folder), read_shape(folder)
    flags.run_dir = flags.run_dir or flags.save
    flags.weight_sync_dir = flags.weight_sync_dir or flags.run_dir
    flags.vocab_size, flags.rank, flags.data_cache_path = policy.vocab, 0, None
    parallel = Parallel(
        sequence="--sequence-parallel" in named,
        recompute=named.get("--recompute-granularity") == ["full"],
        distributed=flags.use_distributed_optimizer,
        offload=flags.ref_offload,
        chunk=flags.logit_chunk_columns,
    )
    return Planable(
        settings=Settings.from_args(flags),
        policy=policy,
        parallel=parallel,
        tensor=flags.tensor_model_parallel_size if "--tensor-model-parallel-size" in named else None,
        pipeline=flags.pipeline_model_parallel_size if "--pipeline-model-parallel-size" in named else None,
        engines=len(flags.rollout_url or []) or flags.rollout_local or 0,
        judges=len(flags.teacher_url or []) or (flags.teacher_replicas if flags.teacher_model else 0),
    )


def read_run(run_dir: Path) -> tuple[Planable, int]:
    """(the command line of a run folder, how many trainer processes it started)

    Raises:
        ArgumentError: no run.json is there, or its flags are no longer understood.
    """
    record = read_run_record(run_dir)
    if record is None:
        raise ArgumentError(f"--from-run {run_dir}: no {FILE} of a run there")
    words = [word for flag, value in record.settings.items() for word in (flag, *shlex.split(value))]
    if record.processes is not None:
        return read_command(words), record.processes
    command = shlex.split(record.command)
    started = (int(command[command.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node") if flag in command)
    return read_command(words), math.prod(started)
