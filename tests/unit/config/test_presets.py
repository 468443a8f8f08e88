"""Presets: expansion, its errors, and what every preset of the paper comes to."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest
from paper_presets import PAPER, TRAINED, paper_criteria

import megatron_sip
from megatron_sip.config.flags import add_arguments
from megatron_sip.config.needs import Needs, criteria_of
from megatron_sip.config.presets import PRESETS, PresetError, expand_presets, known_presets
from megatron_sip.judge.settings import ScheduleSettings, parse_criteria
from megatron_sip.platform.megatron import prepare_megatron


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """Megatron's flags and ours, strict: an unknown flag is an error."""
    prepare_megatron()
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parse(parser: argparse.ArgumentParser, *argv: str) -> argparse.Namespace:
    return parser.parse_args(expand_presets(argv))


def test_every_row_of_the_paper_has_a_preset_and_every_preset_is_checked() -> None:
    assert set(known_presets()) == {*PAPER, *TRAINED, "continual", "thinking-sft", "thinking-rl"}


@pytest.mark.parametrize("name", PAPER)
def test_preset_gives_the_papers_candidates_and_objective(parser: argparse.ArgumentParser, name: str) -> None:
    args = parse(parser, "--preset", name)
    objective, kinds, rollouts, judged = PAPER[name]
    needs = Needs.from_args(args)
    assert (args.objective, needs.kinds, needs.scores) == (objective, kinds, judged)
    assert rollouts is None or args.num_rollouts == rollouts
    ScheduleSettings(name=args.judge_schedule)
    assert parse_criteria(criteria_of(args)) == dict.fromkeys(paper_criteria(name), 1.0)
    assert args.judge_schedule == ("pivot" if "pivot" in name else "all_pairs")


@pytest.mark.parametrize("name", PAPER)
def test_preset_gives_the_papers_hyper_parameters(parser: argparse.ArgumentParser, name: str) -> None:
    args = parse(parser, "--preset", name)
    scratch = name.startswith("from-scratch")
    assert (args.train_iters, args.lr, args.lr_warmup_iters) == ((21000, 5e-4, 2000) if scratch else (2000, 5e-6, 100))
    assert args.min_lr == pytest.approx(0.1 * args.lr)
    assert args.lr_decay_style == "cosine"
    assert (args.global_batch_size, args.seq_length, args.suffix_length) == (256, 2048, 128)
    assert (args.rollout_temperature, args.rollout_top_p) == (1.0, 1.0)
    prompted = name.startswith(("quality", "factuality"))  # GPT-OSS-120B: section 3.2.2
    assert (args.judge_votes, args.judge_temperature, args.judge_top_p) == (5, 1.0, 1.0 if prompted else 0.6)
    assert args.teacher_reasoning_tokens == (2048 if prompted else 0)


@pytest.mark.parametrize("name", TRAINED)
def test_judge_and_rewriter_are_trained_as_in_the_paper(parser: argparse.ArgumentParser, name: str) -> None:
    args = parse(parser, "--preset", name)
    tasks, prompt, answer, criteria = TRAINED[name]
    assert (args.tasks, args.max_prompt_length, args.suffix_length, criteria_of(args)) == (
        tasks,
        prompt,
        answer,
        criteria,
    )
    assert args.seq_length == prompt + answer
    assert (args.objective, args.global_batch_size, args.num_rollouts) == ("grpo", 256, 16)
    assert (args.rollout_temperature, args.rollout_top_p) == (0.6, 0.6)
    assert (args.train_iters, args.lr, args.lr_decay_style, args.grpo_kl_coef) == (500, 2e-7, "constant", 0)
    assert args.judge_verdict == ["hard"]
    assert (args.judge_votes, args.judge_temperature, args.judge_top_p) == (5, 1.0, 0.6)  # of the rewriter's judge
    assert 0 < args.eval_interval < args.train_iters
    assert Needs.from_args(args).teacher == (name == "rewriter")


def test_thinking_learns_every_token_then_by_grpo_without_length_or_spread(parser: argparse.ArgumentParser) -> None:
    """Version 3 of the paper: 10,000 steps on the thoughts, 5,000 of Dr.GRPO, whose judge says 1 or 0."""
    sft, rl = (parse(parser, "--preset", f"thinking-{stage}") for stage in ("sft", "rl"))
    assert (sft.objective, sft.sft_target, sft.task_mode, sft.train_iters) == ("sft", "document", "whole", 10_000)
    assert not Needs.from_args(sft).teacher
    assert not Needs.from_args(sft).engines
    assert (rl.objective, rl.tasks, rl.grpo_length, rl.train_iters) == ("grpo", "thoughts", "constant", 5_000)
    assert (rl.grpo_spread_normalization, rl.grpo_kl_coef) == (False, 0.0)
    assert parse_criteria(rl.criteria) == {"similarity": 1.0}
    assert (rl.judge_verdict, rl.judge_votes) == (["hard"], 1)
    assert rl.seq_length - rl.suffix_length == 2048  # what `prepare thoughts` makes chunks of


def test_fixed_roles_are_chosen_rewrite_rejected_rollout(parser: argparse.ArgumentParser) -> None:
    assert parse(parser, "--preset", "safety-dpo-rewrite-over-rollout").dpo_pair == ["rewrite", "rollout"]


def test_flags_after_the_preset_win_and_flags_before_it_lose(parser: argparse.ArgumentParser) -> None:
    args = parse(parser, "--num-rollouts", "3", "--preset", "safety", "--lr", "1e-5")
    assert (args.num_rollouts, args.lr) == (16, 1e-5)


def test_preset_by_path_may_build_on_a_file_beside_it_and_on_a_known_one(tmp_path: Path) -> None:
    (tmp_path / "base.args").write_text("--preset continual\n--criteria 'my prompt.txt=2'  # a comment\n")
    (tmp_path / "mine.args").write_text("\n# all of it\n--preset=./base.args\n--data-path a.jsonl b.jsonl\n")
    continual = expand_presets(["--preset", "continual"])
    expanded = expand_presets(["--bf16", f"--preset={tmp_path / 'mine.args'}", "--lr", "1"])
    mine = ["--criteria", "my prompt.txt=2", "--data-path", "a.jsonl", "b.jsonl"]
    assert expanded == ["--bf16", *continual, *mine, "--lr", "1"]


def test_presets_are_files_of_the_package() -> None:
    """Where the package is installed without the checkout, they come along."""
    patterns = tomllib.loads((PRESETS.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = Path(megatron_sip.__file__).parent
    assert package / "config" / "preset_files" == PRESETS
    packed = {path for pattern in patterns["megatron_sip"] for path in package.glob(pattern)}
    assert set(PRESETS.iterdir()) <= packed


@pytest.mark.parametrize("argv", [["--preset", "qualty"], ["--preset=qualty"]])
def test_unknown_name_lists_the_known_ones(argv: list[str]) -> None:
    with pytest.raises(PresetError, match=r"qualty\.args; known presets: continual, .*quality, .*safety"):
        expand_presets(argv)


@pytest.mark.parametrize("argv", [["--preset"], ["--preset="], ["--preset", "--lr", "1"]])
def test_missing_value_is_an_error(argv: list[str]) -> None:
    with pytest.raises(PresetError, match="--preset needs a name or a file; known presets"):
        expand_presets(argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("--lr 1\nobjective dpo\n", r"bad\.args:2: 'objective' is no flag"),
        ("--criteria 'quality=1\n", r"bad\.args:1: No closing quotation"),
        ("\n--preset nothing-here\n", r"bad\.args:2: there is no file .*nothing-here\.args; known presets"),
        ("--preset quality safety\n", r"bad\.args:1: --preset takes one name or file, not 2"),
        ("--preset ./bad.args\n", r"bad\.args: presets include each other: bad\.args -> bad\.args"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.args").write_text(content)
    with pytest.raises(PresetError, match=message):
        expand_presets(["--preset", str(tmp_path / "bad.args")])


def test_every_preset_is_in_the_documentation() -> None:
    text = (PRESETS.parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    assert [name for name in known_presets() if f"`{name}`" not in text] == []
