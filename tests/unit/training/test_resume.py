"""What may change when a run continues, and what is said about it."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sip.errors import DataError
from megatron_sip.platform.megatron import prepare_megatron
from megatron_sip.platform.megatron_fixes import under_new_settings

prepare_megatron()  # before anything imports Megatron

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

from megatron_sip.config.checks import _check_schedule, begin_warm_up_above_zero  # noqa: E402
from megatron_sip.training.resume import require_resumable, saved_run, what_is_new  # noqa: E402

SAVED = {
    **{"iteration": 4, "load": "run", "train_iters": 6, "lr": 1e-3, "min_lr": 0.0, "optimizer": "adam", "seed": 1},
    **{"bf16": True, "fp16": False, "use_distributed_optimizer": False, "tensor_model_parallel_size": 1},
    **{"data_path": ["a.jsonl"], "lr_decay_iters": 6, "decoupled_lr": None, "task_fingerprint": "tasks"},
}


def run(**changes: Any) -> Namespace:
    return Namespace(**(SAVED | changes))


def test_new_values_are_allowed_and_told_with_the_old_ones() -> None:
    present = run(lr=5e-4, train_iters=8, lr_decay_iters=None, tensor_model_parallel_size=2)
    require_resumable(run(), present, "tasks")
    assert what_is_new(run(), present) == ["from step 5 on with --lr 0.0005 (was 0.001), --train-iters 8 (was 6)"]
    assert what_is_new(run(), run()) == []


def test_a_run_that_is_further_than_its_end_says_so() -> None:
    [_, line] = what_is_new(run(), run(train_iters=3))
    assert line == "nothing left to train: run is at step 4 of --train-iters 3"


def test_a_run_that_has_nothing_left_to_learn_says_so_and_where_to_go_on() -> None:
    [line] = what_is_new(run(learnt=True), run())
    assert line.startswith(
        "nothing left to learn: run ended so at step 4; to go on with other tasks or rollouts start a new"
    )
    assert "--pretrained-checkpoint run" in line


@pytest.mark.parametrize(
    ("saved", "changes", "named"),
    [
        ({}, {"optimizer": "sgd"}, r"--optimizer sgd \(was adam\)"),
        ({}, {"bf16": False, "fp16": True}, r"--bf16 False \(was True\), --fp16 True \(was False\)"),
        ({}, {"use_distributed_optimizer": True}, r"--use-distributed-optimizer True \(was False\)"),
        ({}, {"decoupled_lr": 1e-5}, r"--decoupled-lr 1e-05 \(was None\)"),
        (
            {"use_distributed_optimizer": True},
            {"use_distributed_optimizer": True, "tensor_model_parallel_size": 2},
            r"--tensor-model-parallel-size 2 \(was 1\)",
        ),
        ({}, {"task_fingerprint": "others", "seed": 99}, r"--seed 99 \(was 1\)"),
        ({}, {"task_fingerprint": "others", "data_path": ["b.jsonl"]}, r"--data-path b.jsonl \(was a.jsonl\)"),
        ({}, {"task_fingerprint": "others"}, "the files or the tokenizer have changed"),
        ({}, {"task_fingerprint": "others", "judge_verdict": ["hard"]}, "the files or the tokenizer have changed"),
        (
            {"tasks": "judgements", "judge_verdict": ["soft"], "max_prompt_length": None},
            {
                "task_fingerprint": "o",
                "tasks": "judgements",
                "judge_verdict": ["hard", "a=soft"],
                "max_prompt_length": 9,
            },
            r"--max-prompt-length 9 \(was not given\), --judge-verdict hard a=soft \(was soft\)",
        ),
        (
            {"tasks": "rewrites", "rewrite_prompt": "a.txt", "judge_prefix_chars": 9, "judge_verdict": ["soft"]},
            {
                **{"task_fingerprint": "o", "tasks": "rewrites", "rewrite_prompt": None, "judge_prefix_chars": 8},
                "judge_verdict": ["hard"],
            },
            r"\(with --judge-prefix-chars 8 \(was 9\), --rewrite-prompt not given \(was a.txt\)\)",
        ),
        (
            {"tasks": "documents"},
            {"task_fingerprint": "others", "tasks": "thoughts"},
            r"--tasks thoughts \(was documents\)",
        ),
    ],
)
def test_what_cannot_change_names_flag_both_values_and_the_way_out(
    saved: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError, match=rf"step 4 of run .*{named}.*--pretrained-checkpoint run and another --save"):
        require_resumable(run(**saved), run(**changes), changes.get("task_fingerprint", "tasks"))


def test_a_fully_reshardable_checkpoint_takes_any_layout() -> None:
    saved = run(use_distributed_optimizer=True, dist_ckpt_optim_fully_reshardable=True)
    require_resumable(saved, run(use_distributed_optimizer=True, tensor_model_parallel_size=2), "tasks")


def test_a_new_folder_and_a_converted_model_have_no_run_to_continue(tmp_path: Path) -> None:
    assert saved_run(tmp_path) is None
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert saved_run(tmp_path) is None


def test_a_group_keeps_what_it_has_learnt_under_new_settings() -> None:
    saved = [{"params": [0, 1], "step": 7, "max_lr": 1e-3, "eps": 1e-8, "of_old_versions": True}]
    present = [{"params": ["tensors"], "step": 0, "max_lr": 5e-4, "eps": 1e-6}]
    assert under_new_settings(present, saved) == [
        {"params": [0, 1], "step": 7, "max_lr": 5e-4, "eps": 1e-6, "of_old_versions": True}
    ]


SCHEDULE = {
    **{"train_iters": 10, "lr": 0.1, "lr_decay_iters": None, "lr_warmup_iters": 4, "lr_warmup_fraction": None},
    **{"lr_warmup_init": 0.0, "lr_decay_style": "linear", "lr_wsd_decay_iters": None},
}


def learning_rates(args: argparse.Namespace, batch: int = 8) -> list[float]:
    """What Megatron's own schedule gives each step."""
    group: dict[str, Any] = {"params": [torch.zeros(1)], "lr": 0.0, "weight_decay": 0.0}
    schedule = OptimizerParamScheduler(
        Namespace(param_groups=[group]),  # type: ignore[arg-type]
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=0.0,
        lr_warmup_steps=args.lr_warmup_iters * batch,
        lr_decay_steps=args.train_iters * batch,
        lr_decay_style=args.lr_decay_style,
        **{"start_wd": 0.0, "end_wd": 0.0, "wd_incr_steps": 1, "wd_incr_style": "constant"},
    )
    rates = []
    for _ in range(args.train_iters):
        rates.append(group["lr"])
        schedule.step(batch)
    return rates


@pytest.mark.parametrize("warm_up", [0, 1, 4])
def test_no_step_trains_at_rate_zero(warm_up: int) -> None:
    args = Namespace(**(SCHEDULE | {"lr_warmup_iters": warm_up}))
    begin_warm_up_above_zero(args)
    rates = learning_rates(args)
    assert min(rates) > 0
    assert rates[0] == pytest.approx(0.1 / max(warm_up, 1))
    assert rates[warm_up] == max(rates) == pytest.approx(0.1)
    assert rates[: warm_up + 1] == sorted(rates[: warm_up + 1])


def test_a_first_rate_that_was_asked_for_stays() -> None:
    args = Namespace(**(SCHEDULE | {"lr_warmup_init": 1e-5}))
    begin_warm_up_above_zero(args)
    assert args.lr_warmup_init == 1e-5


def test_a_warm_up_by_fraction_begins_above_zero_too() -> None:
    args = Namespace(**(SCHEDULE | {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.5}))
    begin_warm_up_above_zero(args)
    assert args.lr_warmup_init == pytest.approx(0.1 / 5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10 must be below --train-iters 10"),
        ({"lr_decay_iters": 4}, "--lr-warmup-iters 4 must be below --lr-decay-iters 4"),
        ({"lr_decay_iters": 0}, "--lr-decay-iters 0 must be at least 1"),
        ({"lr_warmup_init": 0.2}, "--lr-warmup-init 0.2 must not be above --lr 0.1"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
    ],
)
def test_a_schedule_that_megatron_would_only_assert_is_refused(changes: dict[str, Any], named: str) -> None:
    [problem] = _check_schedule(Namespace(**(SCHEDULE | changes)))
    assert named in problem
