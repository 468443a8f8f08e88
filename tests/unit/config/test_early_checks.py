"""The command line before the slow imports: help, every mistake at once, and agreement with Megatron's own parser."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from evidence.__main__ import command_line as evidence_command_line
from megatron_sip.config.early_checks import (
    LITERAL_FLAG,
    MEGATRON_DEFAULTS,
    MEGATRON_FLAGS,
    check_flags,
    early_parser,
    megatron_flag_names,
    words_by_flag,
)
from megatron_sip.config.presets import expand_presets, known_presets
from megatron_sip.data.role_corpus import shares_json
from megatron_sip.data.roles import Shares
from megatron_sip.errors import ArgumentError
from megatron_sip.evaluate import command_line as evaluate_command_line
from megatron_sip.judge.__main__ import command_line as judge_command_line
from megatron_sip.plan import command_line as plan_command_line
from megatron_sip.platform.megatron import prepare_megatron
from megatron_sip.prepare.__main__ import command_line as prepare_command_line

REPO = Path(__file__).parents[3]
COMPLETE = (
    *("--hf-config", "model", "--data-path", "a.jsonl", "--save", "run", "--seq-length", "256", "--train-iters", "3"),
    *("--lr", "1e-3", "--objective", "sft"),
)
SHELL_FLAG = re.compile(r"^ +(--[a-z-]+)\) ", re.MULTILINE)
"""As a shell script takes its own: a branch of `case`."""
OTHER_PROGRAMS = {
    *(
        "--config",
        "--nproc-per-node",
        "--nodes",
        "--max-restarts",
        "--signal",
        "--requeue",
        "--append",
    ),  # torchrun, sbatch, wandb sync
    *("--model-path", "--host", "--port", "--tp-size", "--dp-size", "--enable-deterministic-inference"),  # SGLang
    *("--api-key", "--mem-fraction-static"),
}
"""Flags that the documentation names of programs which are not ours."""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What COMPLETE names."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def megatron() -> argparse.ArgumentParser:
    """Megatron's own parser."""
    prepare_megatron()
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def test_help_shows_every_flag_of_ours_with_its_default_and_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; sys.argv = ['train', '--help']; from megatron_sip.train import main\n"
        "slow = {'torch', 'megatron', 'transformers', 'matplotlib'}\n"
        "try: main()\nfinally: print('IMPORTED', sorted(slow & set(sys.modules)))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "IMPORTED []" in text
    assert text.count("\n") < 400  # 4,046 with Megatron's
    flat = " ".join(text.split())
    for flag, default in (("--suffix-length", "128"), ("--win-rate-prompts", "0"), ("--judge-verdict", "soft")):
        assert re.search(rf"{flag} [^\[]*(\[{flag[2:].upper()}[^\[]*)?.*?\[default: {default}\]", flat), flag
    for action in early_parser()._actions:
        assert action.option_strings[-1] in flat


def test_weights_that_are_not_there_are_told_with_the_other_mistakes_unless_a_run_goes_on_without_them() -> None:
    given = [*COMPLETE, "--pretrained-checkpoint", "nowhere"]
    with pytest.raises(
        ArgumentError, match=r"(?s)2 of the flags.*--num-rollots.*--pretrained-checkpoint nowhere holds no"
    ):
        check_flags([*given, "--num-rollots", "1"])
    check_flags([*given, "--dry-run"])
    check_flags([*COMPLETE, "--pretrained-checkpoint", "model"])  # a Hugging Face folder, which is converted
    Path("run").mkdir()
    Path("run/latest_checkpointed_iteration.txt").write_text("20")
    check_flags(given)


def test_every_mistake_is_told_at_once_with_the_nearest_flag() -> None:
    given = [
        *("--num-rollots", "3", "--lr", "abc", "--bf16", "yes"),
        *("--train-itrs", "5", "--dpo-beta", "-1", "--save", "x"),
    ]
    with pytest.raises(ArgumentError) as caught:
        check_flags([*given, "--seq-lenght", "8", "--objective", "dpo2", "--made-up-by-nobody-at-all"])
    message = str(caught.value)
    for part in (
        *("--num-rollots: there is no such flag; is --num-rollouts meant?", "--lr: invalid float value: 'abc'"),
        *("--bf16: unexpected 'yes' after it", "--train-itrs: there is no such flag; is --train-iters meant?"),
        *("--seq-lenght: there is no such flag; is --seq-length meant?", "--objective: invalid choice: 'dpo2'"),
        *("--made-up-by-nobody-at-all: there is no such flag (--help", "--data-path is required"),
        *("beta is -1.0, must be a positive number", "rollouts need engines"),
        "--pretrained-checkpoint (continue) or --hf-config (from scratch) is required",
    ):
        assert part in message
    assert message.startswith("12 of the flags cannot be used:\n  - ")  # with the judge's server
    assert "--seq-length is required" not in message


def test_one_mistake_is_one_line() -> None:
    with pytest.raises(ArgumentError, match=r"^--dpo-bta: there is no such flag; is --dpo-beta meant\?$"):
        check_flags([*COMPLETE, "--dpo-bta", "0.1"])


def test_files_that_are_not_there_are_named_with_the_rest() -> None:
    with pytest.raises(ArgumentError) as caught:
        check_flags([*COMPLETE, "--hf-config", "nowhere", "--data-path", "none/*.jsonl", "--num-rollots", "1"])
    for part in ("nowhere/config.json does not exist", "none/*.jsonl", "--num-rollots"):
        assert part in str(caught.value)
    check_flags([*COMPLETE, "--data-path", "none/*.jsonl", "--dry-run"])  # only the cost is asked for


def test_a_corpus_is_read_by_the_documents_of_a_role_in_its_own_splits(tmp_path: Path) -> None:
    outputs = {"documents/policy/train/0.jsonl.zst": {"bytes": 0, "sha256": ""}}
    manifest = {"command": "roles", "documents": {"by_role": {"policy/train": 1}}, "shards": [{"outputs": outputs}]}
    manifest["settings"] = shares_json(Shares((Fraction(1), Fraction(0), Fraction(0)), (Fraction(1),) * 3))
    part = tmp_path / "corpus" / "documents" / "policy" / "train"
    part.mkdir(parents=True)
    (part / "0.jsonl.zst").touch()
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    corpus = (*COMPLETE, "--data-path", "corpus")
    assert check_flags([*corpus, "--subset", "policy"]).subset == "policy"
    for flags, says in (
        ((), r"'corpus' is a corpus; name its files, 'corpus/documents/\*\.jsonl\.zst', or with --subset"),
        (("--subset", "judge"), "corpus: no document for judge/train; it has policy/train 1"),
        (
            ("--subset", "policy", "--win-rate-prompts", "8"),
            "corpus: no document for policy/test; it has policy/train 1",
        ),
        (("--subset", "policy", "--split", "9,1"), "--split 9,1: with --subset the corpus has splits of its own"),
        (("--subset", "policy", "--data-path", "a.jsonl"), "--data-path a.jsonl: no such folder"),
        (("--subset", "policy", "--tasks", "judgements"), "--subset: it is for --tasks documents; remove it"),
    ):
        with pytest.raises(ArgumentError, match=says):
            check_flags([*corpus, *flags])


def test_a_folder_that_cannot_be_written_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("no folder")
    command = [sys.executable, "-m", "megatron_sip.train", *COMPLETE, "--save", str(tmp_path / "plain" / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("--save or --run-dir: ")
    assert str(tmp_path / "plain") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_complete_command_passes_with_megatron_s_rarer_flags() -> None:
    args = check_flags([*COMPLETE, "--adam-beta2", "0.95", "--no-persist-layer-norm", "--lr=2e-3", "--clip-grad", "1"])
    assert (args.lr, args.seq_length, args.objective) == (2e-3, 256, "sft")


def test_a_misspelt_flag_of_megatron_s_is_answered_with_megatron_s() -> None:
    with pytest.raises(ArgumentError, match=r"is --(no-)?persist-layer-norm meant"):
        check_flags([*COMPLETE, "--no-persist-layernorm"])


def test_negative_numbers_are_values_and_words_before_flags_are_not() -> None:
    assert words_by_flag(["a", "--x", "-1", "-2.5", "--y=3", "-h"]) == [
        ("", ["a"]),
        ("--x", ["-1", "-2.5"]),
        ("--y", ["3"]),
        ("-h", []),
    ]
    with pytest.raises(ArgumentError, match="'stray' stands before the first flag"):
        check_flags(["stray", *COMPLETE])


def test_no_flag_of_megatron_s_is_taken_for_a_mistake(megatron: argparse.ArgumentParser) -> None:
    real = {name for action in megatron._actions for name in action.option_strings if name.startswith("--")}
    assert real - {"--help"} <= megatron_flag_names()
    assert "--num-rollots" not in megatron_flag_names()


def test_megatron_s_flags_are_parsed_early_as_by_megatron(megatron: argparse.ArgumentParser) -> None:
    theirs = {name: action for action in megatron._actions for name in action.option_strings}
    ours = {name: action for action in early_parser()._actions for name in action.option_strings}
    for flag in MEGATRON_FLAGS:
        mine, original = ours[flag], theirs[flag]
        assert (mine.dest, mine.nargs) == (original.dest, original.nargs), flag
        assert (mine.type or str) is (original.type or str), flag
        if flag in MEGATRON_DEFAULTS and flag != "--save-interval":  # ours: Megatron has none
            assert mine.default == original.default, flag


@pytest.mark.parametrize("name", known_presets())
def test_every_preset_holds_existing_flags_only(name: str) -> None:
    needed = (
        *("--hf-config", "model", "--data-path", "a.jsonl", "--save", "r", "--rollout-url", "http://e"),
        *("--teacher-url", "http://t"),
    )
    check_flags(expand_presets([*needed, "--preset", name, "--teacher-name", "judge"]))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((REPO / "docs").glob("*.md")))])
def test_documentation_names_existing_flags_only(page: str) -> None:
    text = re.sub(r"```.*?```", "", (REPO / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w*-])", text))
    ours = {name for action in early_parser()._actions for name in action.option_strings}
    programs = [*(REPO / "tools").glob("*.py"), *(REPO / "benchmarks").glob("*.py")]
    scripts = {flag for path in programs for flag in LITERAL_FLAG.findall(path.read_text())}
    scripts |= {flag for path in (REPO / "examples").glob("*.sh") for flag in SHELL_FLAG.findall(path.read_text())}
    assert named - ours - scripts - command_flags() - megatron_flag_names() - OTHER_PROGRAMS == set()


def command_flags() -> set[str]:
    """Of `megatron-sip-plan`, `python -m evidence` and all commands of `megatron-sip-prepare`, `-evaluate` and of
    `python -m megatron_sip.judge`."""
    plain = (*plan_command_line()._actions, *evidence_command_line()._actions)
    names = {name for action in plain for name in action.option_strings}
    for parser in (prepare_command_line(), evaluate_command_line(), judge_command_line()):
        [commands] = [action for action in parser._actions if action.dest == "command"]
        assert isinstance(commands.choices, dict)
        names |= {
            name for own in commands.choices.values() for action in own._actions for name in action.option_strings
        }
    return names
