"""Complete command lines without Megatron's parser, and what they come to."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_sip.config.checks import check_required, validate
from megatron_sip.config.flags import add_arguments
from megatron_sip.config.objective_checks import check_row_length
from megatron_sip.config.presets import expand_presets
from megatron_sip.config.settings import Settings

MEGATRON = {
    "seq_length": 2048,
    "micro_batch_size": 1,
    "context_parallel_size": 1,
    "global_batch_size": 256,
    "data_parallel_size": 4,
    "data_path": ["text.jsonl"],
    "train_iters": 10,
    "lr": 5e-6,
    "split": "969,30,1",
    "use_checkpoint_args": False,
    "finetune": False,
    "ckpt_step": None,
    "override_ckpt_iteration": None,
    "eval_interval": None,
    "eval_iters": 100,
    "lr_warmup_iters": 0,
    "lr_warmup_fraction": None,
    "lr_warmup_init": 0.0,
    "lr_decay_iters": None,
    "lr_decay_style": "linear",
    "use_checkpoint_opt_param_scheduler": False,
    "overlap_param_gather": False,
    "virtual_pipeline_model_parallel_size": None,
    "rampup_batch_size": None,
    "exit_interval": None,
    "exit_duration_in_mins": None,
    "clip_grad": 1.0,
    "distributed_timeout_minutes": 60,
    "ckpt_format": "torch_dist",
    "no_save_optim": None,
    "no_load_optim": None,
    "skip_train": False,
    "world_size": 1,
    "seed": 1234,
    "save": "run",
    "load": None,
    "rank": 0,
    "vocab_size": 320,
    "hf_config": "hf",
    "pretrained_checkpoint": None,
    "save_interval": 100,
    "data_cache_path": None,
    "min_lr": 0.0,
}


def arguments(*flags: str, **megatron: Any) -> argparse.Namespace:
    """Our flags parsed, with Megatron's filled in; complete unless overridden."""
    servers = ("--rollout-url", "http://engine:30000", "--teacher-url", "http://teacher:30000")
    args = add_arguments(argparse.ArgumentParser()).parse_args([*servers, *flags])
    for name, value in (MEGATRON | megatron).items():
        setattr(args, name, value)
    return args


def check_all(args: argparse.Namespace) -> None:
    check_required(args)
    validate(args)


def settings(*flags: str, **megatron: Any) -> Settings:
    """The settings of such a command line, checked."""
    args = arguments(*flags, **megatron)
    check_all(args)
    return Settings.from_args(args)


def unchecked_settings(*flags: str, **megatron: Any) -> Settings:
    """Such settings of files that need not be there."""
    folders = {"run_dir": "run", "weight_sync_dir": "run/weights", "row_length": 64, "row_length_given": True}
    return Settings.from_args(arguments(*flags, **(folders | megatron)))


def dry_run_settings(*argv: str) -> Settings:
    """The settings of our flags and of those of Megatron's that the dry run reads."""
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for flag, kind in (("seq-length", int), ("global-batch-size", int), ("train-iters", int), ("lr", float)):
        parser.add_argument(f"--{flag}", type=kind)
    parser.add_argument("--min-lr", type=float)
    parser.add_argument("--lr-warmup-iters", type=int)
    parser.add_argument("--lr-decay-style")
    args, _ = parser.parse_known_args(expand_presets(argv))
    assert not list(check_row_length(args))
    for name in (
        *("seed", "save", "vocab_size", "rank", "data_path", "split", "data_cache_path", "save_interval"),
        "eval_interval",
    ):
        setattr(args, name, MEGATRON[name])
    args.hf_config, args.run_dir, args.weight_sync_dir, args.pretrained_checkpoint = "hf", "run", "run/weights", None
    return Settings.from_args(args)
