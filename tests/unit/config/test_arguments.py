"""Flags that cannot work are refused at once, naming the flag and the mend."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from flag_cases import MEGATRON, arguments, check_all, settings

from megatron_sip.config.checks import check_required, explained, validate
from megatron_sip.config.flags import GROUP_TITLE, add_arguments
from megatron_sip.config.needs import Needs
from megatron_sip.config.parse import find_hf_config
from megatron_sip.config.settings import URL_ROLES
from megatron_sip.errors import ArgumentError


def refusal(*flags: str, **megatron: Any) -> str:
    with pytest.raises(ArgumentError) as caught:
        check_all(arguments(*flags, **megatron))
    return str(caught.value)


def test_the_defaults_are_complete() -> None:
    args = arguments()
    validate(args)
    assert args.row_length == 2048 + 128
    assert args.run_dir == args.load == "run"


def test_a_suffix_longer_than_the_sequence() -> None:
    message = refusal("--suffix-length", "256", seq_length=128)
    assert "--suffix-length 256" in message
    assert "--seq-length 128" in message


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_step_timeout_is_a_time_or_0(seconds: str) -> None:
    assert "--step-timeout" in refusal("--step-timeout", seconds)
    assert settings("--step-timeout", "0").run.step_timeout_s == 0


def test_a_row_too_short_for_a_pair() -> None:
    assert "at least 2176" in refusal("--row-length", "2048")


def test_a_row_holds_a_whole_group_of_grpo_or_the_part_that_it_is_split_into() -> None:
    for flags, branches in (((), 16), (("--branches-per-row", "5"), 5), (("--branches-per-row", "99"), 16)):
        args = arguments("--objective", "grpo", *flags)
        validate(args)
        assert args.row_length == 1920 + branches * 128


def test_grpo_has_a_reference_only_for_its_kl_penalty() -> None:
    kl = ("--objective", "grpo", "--grpo-kl-coef", "0.01", "--ref-update-interval", "5", "--ref-offload")
    assert settings(*kl).objective.needs_reference
    assert not settings("--objective", "grpo").objective.needs_reference
    zero = ("--objective", "grpo", "--truncated-answers", "zero", "--criteria", "quality=1", "safety=1")
    assert settings(*zero).experience.selection.truncated == "zero"


def test_an_unknown_criterion_names_the_known_ones() -> None:
    message = refusal("--criteria", "beauty=1")
    assert "beauty" in message
    for known in ("quality", "safety", "factuality", "likelihood"):
        assert known in message


def test_likelihood_needs_prompt_logprobs() -> None:
    assert "--teacher-api sglang" in refusal("--teacher-api", "openai", "--teacher-name", "m")


def test_dpo_needs_two_candidates() -> None:
    assert "--candidates" in refusal("--candidates", "rollout", "--num-rollouts", "1")


def test_rf_nll_needs_something_that_a_rollout_can_lose_against() -> None:
    lone = ("--objective", "rf-nll", "--candidates", "rollout", "--num-rollouts", "1")
    assert "--objective rf-nll" in refusal(*lone)
    validate(arguments(*lone[:-1], "2"))


def test_a_budget_that_cannot_link_all_candidates_names_the_least() -> None:
    """The suffix and 16 rollouts: every group would be dropped."""
    adaptive = ("--criteria", "quality=1", "--judge-schedule", "two_ended_bt", "--judge-budget")
    message = refusal(*adaptive, "15")
    assert "--judge-budget 15" in message
    assert "at least 16 pairs" in message
    validate(arguments(*adaptive, "16"))
    validate(arguments(*adaptive, "1", "--criteria", "likelihood"))  # no pairs are compared


@pytest.mark.parametrize(
    "flags",
    [
        ("--candidates", "rollout"),
        ("--candidates", "suffix", "rollout", "--judge-pivot-competes"),
        ("--judge-pivot", "rollout"),
        ("--judge-pivot", "rollout", "--judge-pivot-competes"),
    ],
)
def test_pivots_that_are_possible(flags: tuple[str, ...]) -> None:
    validate(arguments("--criteria", "quality=1", "--judge-schedule", "pivot", *flags))


def test_dpo_cannot_wait_for_rollouts_with_one_other_candidate() -> None:
    assert "--rollout-start-step" in refusal("--rollout-start-step", "100")
    validate(arguments("--rollout-start-step", "100", "--candidates", "suffix", "rewrite", "rollout"))


ALL = ("--candidates", "suffix", "rewrite", "rollout")
RF_NLL = ("--objective", "rf-nll", "--criteria", "quality=1", "safety=1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--suffix-end-step", "5", "--num-rollouts", "1"),
            "--suffix-end-step 5 leaves 1 candidate(s) at step 5, too few",
        ),
        ((*ALL, "--rewrite-end-step", "0"), "--rewrite-end-step 0: must be at least 1"),
        (("--rewrite-end-step", "5"), "--rewrite-end-step 5: rewrite is no candidate of this run"),
        (
            (
                *ALL,
                "--objective",
                "rf-nll",
                "--suffix-end-step",
                "3",
                "--rewrite-end-step",
                "3",
                "--rollout-start-step",
                "9",
            ),
            "--rollout-start-step 9 with --suffix-end-step 3 with --rewrite-end-step 3 leaves 0 candidate(s) at step 3",
        ),
        (
            (*ALL, "--objective", "rf-nll", "--num-rollouts", "1", "--suffix-end-step", "3", "--rewrite-end-step", "7"),
            "--suffix-end-step 3 with --rewrite-end-step 7 leaves 1 candidate(s) at step 7, too few for --objective rf-nll",
        ),
        (
            ("--objective", "sft", "--suffix-end-step", "4"),
            "at step 4, too few for --objective sft --sft-target suffix",
        ),
        (("--dpo-pair", "rewrite", "rollout", "--rewrite-end-step", "4"), "--objective dpo --dpo-pair rewrite rollout"),
        (
            ("--judge-pivot-competes", "--judge-schedule", "pivot", "--suffix-end-step", "3"),
            "--suffix-end-step 3: the suffix",
        ),
        (("--task-mode", "whole"), "--task-mode whole cuts no suffixes"),
        (
            (*("--objective", "sft", "--sft-target", "document", "--task-mode", "whole"), "--win-rate-prompts", "8"),
            "--win-rate-prompts compares",
        ),
        (("--control-token", "safety", "--criteria", "safety"), "--control-token is for --objective rf-nll"),
        ((*RF_NLL, "--control-token", "beauty"), "--control-token beauty is not among --criteria quality=1 safety=1"),
        ((*RF_NLL, "--control-text", "a", "b"), "--control-text belongs to --control-token"),
        (
            (*RF_NLL, "--control-token", "safety", "--control-text", "a", "a"),
            "--control-text 'a' 'a': two different texts",
        ),
        (
            ("--objective", "rf-nll", "--control-token", "likelihood"),
            "--control-threshold 0.5: likelihood is a mean log-prob",
        ),
        ((*RF_NLL, "--control-token", "safety", "--row-length", "2050"), "at least 2064"),
        ((*ALL, "--rewrite-prompt", "absent.txt"), "--rewrite-prompt absent.txt: No such file"),
    ],
)
def test_candidates_that_end_documents_and_control_texts_need_their_conditions(
    flags: tuple[str, ...], message: str
) -> None:
    assert message in refusal(*flags)


def test_candidates_may_end_where_enough_others_are_left() -> None:
    validate(arguments(*ALL, "--suffix-end-step", "5", "--rewrite-end-step", "5"))
    validate(arguments(*ALL, "--objective", "rf-nll", "--suffix-end-step", "5", "--rollout-start-step", "9"))
    args = arguments(*RF_NLL, "--control-token", "safety")
    validate(args)
    assert args.row_length == 2048 + 1 + len("[safety: good]\n")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--dpo-pair", "rewrite", "rewrite"), "--dpo-pair"),
        (("--dpo-pair", "rewrite", "rollout", "--objective", "rf-nll"), "--dpo-pair"),
        (("--objective", "rf-nll", "--ref-update-interval", "5"), "--ref-update-interval"),
        (("--objective", "rf-nll", "--ref-offload"), "--ref-offload"),
        (("--logit-chunk-columns", "-1"), "--logit-chunk-columns"),
        (("--objective", "grpo", "--num-rollouts", "1"), "--num-rollouts 1"),
        (("--objective", "grpo", "--candidates", "suffix"), "add rollout to --candidates"),
        (("--objective", "grpo", "--rollout-temperature", "0"), "--rollout-temperature 0"),
        (("--objective", "grpo", "--rollout-start-step", "5"), "--rollout-start-step 5"),
        (("--objective", "grpo", "--grpo-oversample", "0"), "--grpo-oversample 0"),
        (("--objective", "grpo", "--branches-per-row", "0"), "--branches-per-row 0"),
        (("--objective", "grpo", "--row-length", "2048"), "let --branches-per-row split a group"),
        (("--objective", "grpo", "--truncated-answers", "zero"), "likelihoods are below 0"),
        (("--objective", "grpo", "--grpo-clip-low", "1"), "--grpo-clip-low is 1.0"),
        (("--objective", "grpo", "--ref-offload"), "--grpo-kl-coef above 0"),
        (("--objective", "grpo", "--ref-update-interval", "5"), "--grpo-kl-coef above 0"),
        (("--objective", "grpo", "--dpo-pair", "suffix", "rollout"), "--dpo-pair"),
        (("--grpo-kl-coef", "0.1"), "--grpo-kl-coef: for --objective grpo only"),
        (("--grpo-spread-normalization",), "--grpo-spread-normalization"),
        (("--branches-per-row", "4"), "--branches-per-row: for --objective grpo only"),
        (("--truncated-answers", "mask"), "--truncated-answers"),
        (("--mismatch-correction", "none"), "--mismatch-correction"),
        (("--dpo-beta", "0"), "--dpo-beta"),
        (("--rollout-local", "1"), "--rollout-local"),
        (("--teacher-model", "somewhere"), "--teacher-model"),
        (("--teacher-api", "openai"), "--teacher-name"),
        (("--num-rollouts", "0"), "--num-rollouts"),
        (("--dpo-label-smoothing", "0.6"), "--dpo-label-smoothing"),
        (("--rollout-url", "engine:30000"), "http://"),
        (("--judge-degree", "5"), "--judge-degree"),
        (("--judge-budget", "0"), "--judge-budget"),
        (("--judge-pivot-competes", "--criteria", "quality"), "--judge-pivot-competes"),
        (("--criteria", "quality", "--judge-schedule", "pivot"), "--judge-pivot-competes"),
        (
            (
                *("--criteria", "quality", "--judge-schedule", "pivot", "--judge-pivot", "rollout", "--candidates"),
                *("suffix", "rewrite"),
            ),
            "--judge-pivot rollout",
        ),
        (
            (
                *("--criteria", "quality", "--judge-schedule", "pivot"),
                *("--judge-pivot-competes", "--candidates"),
                "rollout",
            ),
            "--judge-pivot suffix",
        ),
        (
            ("--criteria", "quality", "--judge-schedule", "pivot", "--judge-pivot", "rollout", "--num-rollouts", "1"),
            "--num-rollouts",
        ),
        (("--judge-votes", "0"), "--judge-votes"),
        (("--judge-max-tokens", "0"), "--judge-max-tokens"),
        (("--judge-prefix-chars", "0"), "--judge-prefix-chars"),
        (("--judge-quorum", "0"), "--judge-quorum"),
        (("--judge-audit-rate", "2"), "--judge-audit-rate"),
        (("--judge-top-p", "0"), "--judge-top-p"),
        (("--judge-temperature", "-1"), "--judge-temperature"),
        (("--judge-deadline", "0"), "--judge-deadline"),
        (("--judge-concurrency", "0"), "--judge-concurrency"),
        (("--judge-verdict", "firm"), "--judge-verdict"),
        (("--judge-verdict", "soft", "safety=hard"), "--judge-verdict"),
        (
            ("--judge-likelihood-prior", "--criteria", "quality", "--teacher-api", "openai", "--teacher-name", "m"),
            "sglang",
        ),
        (("--teacher-timeout", "0"), "--teacher-timeout"),
        (("--teacher-reasoning-tokens", "-1"), "--teacher-reasoning-tokens"),
        (("--teacher-requests-per-second", "-1"), "--teacher-requests-per-second"),
        (("--teacher-context", "0"), "--teacher-context"),
        (("--teacher-prefill",), "--teacher-prefill"),
        (("--rewrite-temperature", "-1", "--candidates", "rewrite", "rollout"), "--rewrite-temperature"),
        (("--replay-groups", "absent"), "--replay-groups"),
        (("--ref-update-interval", "-1"), "--ref-update-interval -1: must be at least 0"),
        (("--win-rate-prompts", "-1"), "--win-rate-prompts -1: must be at least 0"),
        (("--rollout-start-step", "-1"), "--rollout-start-step -1: must be at least 0"),
        (("--rollout-local", "-1"), "--rollout-local -1: must be at least 0"),
        (("--local-engine-tokens", "0"), "--local-engine-tokens 0: must be at least 1"),
        (("--weight-sync-bucket-mb", "0"), "--weight-sync-bucket-mb 0: must be at least 1"),
        (("--rollout-timeout", "0"), "--rollout-timeout 0: seconds are needed"),
        (("--rollout-temperature", "nan"), "--rollout-temperature nan: a number is needed"),
    ],
)
def test_contradictions(flags: tuple[str, ...], named: str) -> None:
    assert named in refusal(*flags)


@pytest.mark.parametrize(
    ("megatron", "named"),
    [
        ({"global_batch_size": 255}, "--global-batch-size 255"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"micro_batch_size": 2}, "--row-length"),
        ({"data_path": None}, "--data-path"),
        ({"train_iters": None}, "--train-iters"),
        ({"save": None}, "--save is required"),
        ({"lr": None}, "--lr is required"),
        ({"seq_length": None}, "--seq-length is required"),
        ({"use_checkpoint_args": True}, "--hf-config"),
        ({"split": "1/0,1"}, "--split '1/0,1'"),
        ({"finetune": True}, "--pretrained-checkpoint"),
        ({"ckpt_step": 5}, "run/latest_checkpointed_iteration.txt"),
        ({"override_ckpt_iteration": 5}, "run/latest_checkpointed_iteration.txt"),
        ({"eval_iters": 10}, "--win-rate-prompts"),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters"),
        ({"load": "elsewhere"}, "--pretrained-checkpoint"),
        ({"overlap_param_gather": True}, "--overlap-param-gather"),
        ({"virtual_pipeline_model_parallel_size": 2}, "--num-layers-per-virtual-pipeline-stage"),
        ({"exit_interval": 5}, "SIGTERM"),
        ({"clip_grad": 0.0}, "--clip-grad"),
        ({"ckpt_format": "torch"}, "--ckpt-format torch"),
        ({"distributed_timeout_minutes": 10}, "--rollout-timeout 600"),
        ({"no_save_optim": True}, "--no-save-optim"),
        ({"skip_train": True}, "--skip-train"),
    ],
)
def test_flags_of_megatron_that_do_not_fit(megatron: dict[str, Any], named: str) -> None:
    assert named in refusal(**megatron)


@pytest.mark.parametrize("role", URL_ROLES)
def test_passwords_and_keys_are_refused_before_megatron_prints_and_saves_its_arguments(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint keeps the arguments, and wandb and tensorboard show them: they never hold a secret."""
    role = role.replace("_", "-")
    args = arguments(f"--{role}-url", "http://me:secret@host:1", "http://host/v1?key=secret")
    with pytest.raises(ArgumentError) as caught:
        check_required(args)  # the first of all checks
    assert f"--{role}-url http://***@host:1: a URL with user or password would be logged" in str(caught.value)
    assert f"give the key through --{role}-key-variable" in str(caught.value)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("SERVER_KEY", "secret\n")
    flags = (f"--{role}-url", "http://host", f"--{role}-key-variable", "SERVER_KEY")
    assert f"--{role}-key-variable: the API key in environment variable SERVER_KEY has a line break" in refusal(*flags)
    monkeypatch.setenv("SERVER_KEY", "secret")
    passed = arguments(*flags)
    check_all(passed)
    assert "secret" not in repr(vars(passed))


def test_the_default_and_none_of_megatron_s_evaluation_are_accepted() -> None:
    for iterations in (None, 0, 100):
        validate(arguments(eval_iters=iterations))


def test_an_assertion_is_told_by_its_message_or_its_line() -> None:
    with pytest.raises(ArgumentError, match=r"^flags: four is even$"), explained("flags"):
        raise AssertionError("four is even")
    with pytest.raises(ArgumentError, match=r"^flags: .*`return left < right` fails") as caught, explained("flags"):
        compare(None, 4)
    assert str(caught.value).endswith(f"({__file__}:{compare.__code__.co_firstlineno + 1})")


def compare(left: Any, right: Any) -> bool:
    return left < right


def test_servers_are_required_only_for_what_uses_them() -> None:
    without = add_arguments(argparse.ArgumentParser()).parse_args(["--objective", "sft"])
    for name, value in MEGATRON.items():
        setattr(without, name, value)
    validate(without)
    assert not Needs.from_args(without).engines
    assert not Needs.from_args(without).teacher
    without.objective, without.row_length = "dpo", None
    with pytest.raises(ArgumentError, match="--rollout-url"):
        validate(without)


def test_what_a_run_needs_follows_from_the_objective() -> None:
    pair = Needs.from_args(arguments("--dpo-pair", "rewrite", "rollout"))
    assert pair.kinds == ("rewrite", "rollout")
    assert not pair.scores
    assert pair.teacher
    assert Needs.from_args(arguments("--objective", "sft", "--sft-target", "rewrite")).kinds == ("rewrite",)


def test_the_policy_is_found_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(ArgumentError, match="megatron-sip-convert"):
        find_hf_config(None, str(tmp_path))
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert find_hf_config(None, str(tmp_path)) == tmp_path / "hf"
    with pytest.raises(ArgumentError, match="--hf-config"):
        find_hf_config(None, None)
    with pytest.raises(ArgumentError, match="--hf-config must name"):
        find_hf_config(str(tmp_path / "absent"), None)


def test_every_flag_stands_in_our_group_with_a_help_text() -> None:
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    groups = [group for group in parser._action_groups if (group.title or "").startswith(GROUP_TITLE)]
    actions = [action for group in groups for action in group._group_actions]
    assert len(actions) == len(parser._actions)
    assert all(action.help for action in actions)
    assert "--suffix-length" in parser.format_help()
