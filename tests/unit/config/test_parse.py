"""The real parser, Megatron's and ours: the documented command, what every run gets unasked, refusals without a traceback."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_tokenizer import byte_level_tokenizer
from transformers import LlamaConfig

from megatron_sip.config.parse import SAVE_INTERVAL, megatron_help
from megatron_sip.errors import ArgumentError
from megatron_sip.platform.megatron import prepare_megatron

REPO = Path(__file__).parents[3]
Parse = Callable[..., argparse.Namespace]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A converted model as --pretrained-checkpoint expects it, as far as the flags read it."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    config.save_pretrained(tmp_path / "model" / "hf")
    byte_level_tokenizer().save_pretrained(tmp_path / "model" / "hf")
    return tmp_path / "model"


@pytest.fixture
def parse(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parse]:
    """`parse_arguments` on a small complete command line and more flags, which win; Megatron's globals are undone."""
    prepare_megatron()
    from megatron.training.global_vars import unset_global_variables

    from megatron_sip.config.parse import parse_arguments

    complete = {
        "--pretrained-checkpoint": str(model),
        "--save": str(tmp_path / "run"),
        "--data-path": "text.jsonl",
        "--seq-length": "256",
        "--train-iters": "3",
        "--lr": "1e-3",
        "--objective": "sft",
    }
    monkeypatch.setattr(sys, "argv", ["train"])

    def parsed(*flags: str, without: str = "") -> argparse.Namespace:
        given = [word for flag, value in complete.items() if flag != without for word in (flag, value)]
        return parse_arguments([*given, *flags])

    yield parsed
    unset_global_variables()


def documented_command(first_words: str) -> list[str]:
    """The words of the command in docs/training.md that holds `first_words`, from there on."""
    text = re.sub(r"\s*\\\n\s*", " ", (REPO / "docs/training.md").read_text())
    [line] = [line for line in text.splitlines() if first_words in line]
    return shlex.split(line.partition(first_words)[2])


def test_the_documented_command_is_accepted(parse: Parse, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sip.config.parse import parse_arguments

    words = documented_command("-m megatron_sip.train --pretrained-checkpoint")[1:]
    monkeypatch.setenv("WORLD_SIZE", "8")  # torchrun --nproc-per-node 8
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = parse_arguments(["--pretrained-checkpoint", str(model), *words])
    assert (args.tensor_model_parallel_size, args.data_parallel_size) == (2, 4)
    assert (args.seq_length, args.train_iters, args.num_layers) == (2048, 2000, 2)
    assert args.save_interval == SAVE_INTERVAL
    assert args.load == args.run_dir == "runs/llama-1b"


def test_a_save_interval_given_wins(parse: Parse) -> None:
    assert parse("--save-interval", "7").save_interval == 7


def test_a_value_that_only_megatron_refuses_is_told_in_a_line(parse: Parse, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArgumentError, match=r"^--adam-beta2: invalid float value: 'x'"):
        parse("--adam-beta2", "x")
    assert "usage:" not in capfd.readouterr().err


def test_the_help_of_megatron_s_flags_can_be_formatted_and_holds_none_of_ours() -> None:
    prepare_megatron()
    text = megatron_help()  # one of Megatron's help texts holds a bare %
    assert "--tensor-model-parallel-size" in text
    assert "--num-rollouts" not in text


def test_flags_win_over_a_checkpoint_s_schedule_and_warm_up_begins_above_zero(parse: Parse) -> None:
    args = parse("--lr-warmup-iters", "2")
    assert args.override_opt_param_scheduler
    assert args.lr_warmup_init == pytest.approx(1e-3 / 2)


@pytest.mark.parametrize(("flags", "scale"), [((), 2**12), (("--initial-loss-scale", "64"), 64)])
def test_float16_begins_at_a_loss_scale_near_the_one_it_needs(parse: Parse, flags: tuple[str, ...], scale: int) -> None:
    args = parse("--fp16", *flags)
    assert (args.initial_loss_scale, args.hysteresis) == (scale, 1)


@pytest.mark.parametrize("flag", ["--data-path", "--seq-length", "--train-iters", "--lr", "--save"])
def test_a_required_flag_is_named(parse: Parse, flag: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{flag} is required"):
        parse(without=flag)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--seq-length", "8192"), r"max_position_embeddings \(4096\) must be .* seq_length \(8192\)"),
        (("--num-experts", "4"), "--num-experts"),
        (("--normalization", "LayerNorm"), "--normalization must be RMSNorm"),
        (("--min-lr", "1"), r"`assert args.min_lr <= args.lr` fails \(.*arguments.py:\d+\)"),
        (("--save-interval", "0"), r"`assert args.save_interval > 0` fails"),
        (("--tensor-model-parallel-size", "2"), r"world size \(1\) is not divisible"),
        (("--split", "1/0,1"), "--split '1/0,1'"),
        (("--attention-dropout", "0.1"), "--attention-dropout must be 0"),
        (("--window-size", "64,0"), "--window-size is not supported"),
        (("--softmax-type", "learnable"), "--softmax-type must be vanilla"),
        (("--rotary-percent", "0.5"), "--rotary-percent is not supported"),
        (("--rotary-percent", "0"), "--rotary-percent is not supported"),
        (("--rotary-interleaved",), "--rotary-interleaved is not supported"),
        (("--no-rope-freq", "4"), "--no-rope-freq is not supported"),
        (("--apply-layernorm-1p",), "--apply-layernorm-1p is not supported"),
        (("--rotary-seq-len-interpolation-factor", "2"), "--rotary-seq-len-interpolation-factor is not supported"),
        (("--finetune",), "--finetune"),
        (("--async-save",), "--async-save: a step is saved"),
        (("--ckpt-step", "2"), "--ckpt-step"),
        (("--use-checkpoint-opt-param-scheduler",), "--use-checkpoint-opt-param-scheduler: a run that continues takes"),
        (("--lr-warmup-iters", "2", "--lr-decay-iters", "2"), "--lr-warmup-iters 2 must be below --lr-decay-iters 2"),
        (("--eval-iters", "10"), "--win-rate-prompts"),
        (("--yaml-cfg", __file__), "--yaml-cfg: flags come from the command line"),
    ],
)
def test_what_megatron_or_the_policy_cannot_do_is_told_without_a_traceback(
    parse: Parse, flags: tuple[str, ...], named: str
) -> None:
    with pytest.raises(ArgumentError, match=named):
        parse(*flags)


@pytest.mark.parametrize(("size", "named"), [(3, r"attention heads \(4\)"), (8, r"attention heads \(4\)")])
def test_a_tensor_parallel_size_that_the_model_cannot_have(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, size: int, named: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(ArgumentError, match=f"--tensor-model-parallel-size {size} does not divide .*{named}"):
        parse("--tensor-model-parallel-size", str(size))


def test_more_tensor_parallel_ranks_than_key_value_heads(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    args = parse("--tensor-model-parallel-size", "4")
    assert (args.tensor_model_parallel_size, args.num_query_groups) == (4, 2)


def test_an_architecture_that_is_not_supported(parse: Parse, model: Path) -> None:
    (model / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ArgumentError, match=r"hf/config.json: model_type 'gpt2' .* supported are llama"):
        parse()


@pytest.mark.parametrize(
    ("flag", "value"), [("--vocab-size", "330"), ("--ffn-hidden-size", "96"), ("--rotary-base", "7")]
)
def test_a_flag_that_makes_another_model_than_the_config_is_refused(parse: Parse, flag: str, value: str) -> None:
    """The engines serve the config's model, and exports are cut to its sizes."""
    with pytest.raises(
        ArgumentError, match=rf"hf/config.json is of another model than the flags \({flag} {value} there"
    ):
        parse(flag, value)


def test_a_pointer_in_place_of_the_tokenizer(parse: Parse, model: Path) -> None:
    (model / "hf" / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2\n"
    )
    with pytest.raises(ArgumentError, match=r"tokenizer.json is a git-LFS pointer"):
        parse()


def test_a_hugging_face_folder_as_the_pretrained_checkpoint(
    parse: Parse, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(
        "megatron_sip.config.parse.converted_checkpoint", lambda folder: asked.append(folder) or tmp_path / "converted"
    )
    given = ("--pretrained-checkpoint", str(model / "hf"))
    args = parse(*given)
    assert (args.pretrained_checkpoint, args.hf_config) == (str(tmp_path / "converted"), str(model / "hf"))
    assert asked == [model / "hf"]


def test_a_dry_run_converts_nothing(parse: Parse, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sip.config.parse.converted_checkpoint", lambda _: pytest.fail("it converted"))
    assert parse("--dry-run", "--pretrained-checkpoint", str(model / "hf")).hf_config == str(model / "hf")


def test_a_folder_that_cannot_be_converted_is_told_in_a_line(parse: Parse, model: Path) -> None:
    """Before a process is started for it: the config and no weights."""
    with pytest.raises(ArgumentError, match=r"--pretrained-checkpoint .*hf: .*holds neither model.safetensors"):
        parse("--pretrained-checkpoint", str(model / "hf"))


@pytest.mark.parametrize("content", ['{"model_type": "lla', "{}", '{"model_type": "made_up"}'])
def test_a_broken_config(parse: Parse, model: Path, content: str) -> None:
    (model / "hf" / "config.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"hf/config.json: "):
        parse()


def test_a_dry_run_shows_its_answer_alone(model: Path, tmp_path: Path) -> None:
    """Megatron alone prints 860 lines before it."""
    flags = ["--pretrained-checkpoint", str(model), "--save", "run", "--data-path", "none.jsonl", "--seq-length", "256"]
    command = [sys.executable, "-m", "megatron_sip.train", *flags, "--train-iters", "3", "--lr", "1e-3", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=True
    )
    assert done.stdout.startswith("What this run does\n")
    assert len(done.stdout.splitlines()) < 30
    assert done.stderr == ""
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing_and_starts_no_wandb_run(
    parse: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb.init was called"))
    before = sorted(tmp_path.rglob("*"))
    folders = ("--tensorboard-dir", str(tmp_path / "board"), "--wandb-save-dir", str(tmp_path / "wandb"))
    args = parse("--dry-run", *folders, "--wandb-project", "p", "--wandb-exp-name", "e")
    assert args.dry_run
    assert sorted(tmp_path.rglob("*")) == before


def test_tensorboard_is_written_without_dry_run(parse: Parse, tmp_path: Path) -> None:
    parse("--tensorboard-dir", str(tmp_path / "board"))
    assert list((tmp_path / "board").iterdir())


SHOW_WANDB_MODE = """
import os
from megatron_sip.config.parse import keep_wandb_offline_without_login
keep_wandb_offline_without_login()
import json, wandb
print(json.dumps(wandb.setup().settings.mode), flush=True)
os._exit(0)  # wandb's own end asks its servers, which may take minutes to be out of reach
"""


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, False, "offline"),
        ({}, True, "online"),
        ({"WANDB_API_KEY": "b" * 40}, False, "online"),
        ({"WANDB_MODE": "disabled"}, False, "disabled"),
        ({"WANDB_MODE": "online"}, False, "online"),
        ({"WANDB_MODE": "offline"}, True, "offline"),
    ],
)
def test_wandb_is_offline_only_where_nobody_logged_in(
    tmp_path: Path, environment: dict[str, str], netrc: bool, mode: str
) -> None:
    if netrc:  # what `wandb login` writes
        (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'a' * 40}\n")
        (tmp_path / ".netrc").chmod(0o600)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    command = [sys.executable, "-c", SHOW_WANDB_MODE]
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    result = subprocess.run(
        command, env=clean | home | environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(result.stdout.splitlines()[-1]) == mode
