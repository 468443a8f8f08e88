"""Figures and commands in the documentation against the code they speak of."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from flag_cases import dry_run_settings

from megatron_sip.config.dry_run import describe, prompt_cost
from megatron_sip.config.early_checks import check_flags, early_parser, megatron_flag_names, words_by_flag
from megatron_sip.config.presets import expand_presets, known_presets
from megatron_sip.evaluate import COMMANDS
from megatron_sip.evaluate import command_line as evaluate_command_line
from megatron_sip.hf.convert import command_line as converter_command_line
from megatron_sip.hf.families import FAMILIES
from megatron_sip.judge.settings import SCHEDULE_NAMES, known_criteria
from megatron_sip.one_node.command import layout_flags, understand
from megatron_sip.one_node.layout import Layout
from megatron_sip.prepare.__main__ import command_line as prepare_command_line

REPO = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "tests/README.md",
    *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")),
]


def page(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def commands(text: str, program: str) -> list[list[str]]:
    """The words after `program` of each command in the fenced blocks of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(program + " ")]


def test_readme_s_commands_for_one_node_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(page("README.md"), "megatron-sip")
    assert len(found) == 4  # a node with GPUs, one without, a judge, a policy by it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPO / "examples")
    for file in ("web/a.jsonl.zst", "my/a.jsonl", "judgements/judgements.jsonl"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(b"")
    for words in found:
        for model in (words[0], *after(words, "--teacher")[:1]):
            (tmp_path / model).mkdir(parents=True, exist_ok=True)
            (tmp_path / model / "config.json").write_text("{}")
        request = understand(words)
        assert "--criteria" in request.flags or "judgements" in words[1]  # else the likelihood would judge
        if words[1] == "corpus":  # which is read
            continue
        args = check_flags(
            [
                *request.flags,
                *layout_flags(Layout(2, 1, 2, 4 * ("--teacher" in words)), request.flags),
                "--hf-config",
                words[0],
            ]
        )
        assert args.run_dir == (after(words, "--run-dir") or [f"runs/{words[0]}"])[0]
    first = check_flags([*understand(found[0]).flags, "--hf-config", found[0][0], "--rollout-local", "1"])
    assert (first.criteria, first.judge_verdict, first.win_rate_prompts) == (["quality=1", "safety=1"], ["soft"], 200)
    assert f"`runs/{found[0][0]}/hf`" in page("README.md")


def after(words: list[str], flag: str) -> list[str]:
    """The words behind a flag; none where it is not among them."""
    return words[words.index(flag) + 1 :] if flag in words else []


def anchors(text: str) -> set[str]:
    """What a Markdown page's headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_links_to_and_runs_exists(name: str) -> None:
    text = page(name)
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = (REPO / name).parent / path if path else REPO / name
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target
    for path in re.findall(r"python ((?:tools|benchmarks)/\w+\.py)", text):
        assert (REPO / path).exists(), path
    entries = tomllib.loads(page("pyproject.toml"))["project"]["scripts"]
    assert set(re.findall(r"`(megatron-sip[\w-]*)[ `]", text)) <= entries.keys()
    for words in commands(text, "megatron-sip-convert"):
        converter_command_line().parse_args(words)
    for words in commands(text, "megatron-sip-prepare"):
        prepare_command_line().parse_args(words)
    for words in commands(text, "megatron-sip-evaluate"):
        evaluate_command_line().parse_args(words)


def test_evaluation_md_s_commands_read_what_those_before_them_wrote() -> None:
    words = commands(page("docs/evaluation.md"), "megatron-sip-evaluate")
    written: list[Path] = []
    for given in map(evaluate_command_line().parse_args, words):
        read = {"compare": ("base", "model"), "rate": ("generations",), "diversity": ("generations",)}.get(
            given.command, ()
        )
        for name in read:
            found = getattr(given, name)
            assert {Path(path) for path in (found if isinstance(found, list) else [found])} <= set(written)
        if given.command == "table":
            assert {str(path.parent) for path in written if path.suffix == ".json"} >= set(given.runs)
        written += [given.output] if getattr(given, "output", None) else []
    assert {given[0] for given in words} == COMMANDS.keys()


def test_the_hops_of_architecture_md_are_ten_files_and_its_rooms_are_all_folders() -> None:
    text = page("docs/architecture.md")
    hops = re.findall(r"^(\d+)\. `(megatron_sip/[\w/]+\.py)`", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in hops] == list(range(1, 11))
    assert [
        path for path in re.findall(r"`((?:megatron_sip|csrc|tests)/[\w/.]*)`", text) if not (REPO / path).exists()
    ] == []
    rooms = {f"megatron_sip/{path.parent.name}/" for path in (REPO / "megatron_sip").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^\| `(\S+/)` ", text, flags=re.MULTILINE))


def test_files_that_contributing_md_names_exist() -> None:
    named = re.findall(r"`((?:megatron_sip|tests)/[\w/.]+)`", page("CONTRIBUTING.md"))
    assert len(named) >= 8
    assert [path for path in named if not (REPO / path).exists()] == []


def test_files_and_functions_are_as_short_as_contributing_md_says() -> None:
    [lines, of_function] = re.findall(r"at most (\d+)\s+lines, a function at most (\d+)", page("CONTRIBUTING.md"))[0]
    for folder in ("megatron_sip", "tools", "benchmarks", "csrc", "tests"):
        for path in (path for path in (REPO / folder).rglob("*") if path.suffix in (".py", ".cpp", ".cu", ".h")):
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= int(lines), path
            if path.suffix == ".py" and folder != "tests":
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                        assert node.end_lineno - node.lineno < int(of_function), f"{path}: {node.name}"


def test_one_version_everywhere() -> None:
    version = tomllib.loads(page("pyproject.toml"))["project"]["version"]
    assert f"\nversion: {version}\n" in page("CITATION.cff")
    assert re.search(r"^## ([\d.]+)", page("CHANGELOG.md"), flags=re.MULTILINE)[1] == version


def test_readme_s_table_of_models_knows_every_family() -> None:
    [row] = re.findall(r"^\| policy \|.*$", page("README.md"), flags=re.MULTILINE)
    assert [family for family in FAMILIES if family not in row.lower()] == []


def test_engines_in_training_md_hold_the_sequences_of_its_trainer() -> None:
    text = page("docs/training.md")
    [length] = set(re.findall(r"--seq-length (\d+)", text))
    assert re.findall(r"--context-length (\d+)", text) == [str(int(length) + 8)]


def test_the_costs_in_presets_md_are_what_a_dry_run_says() -> None:
    shown = re.findall(r"^ {6}(\S.*?) {2,}([\d,]+) +([\d,]+) +([\d,]+)$", page("docs/presets.md"), flags=re.MULTILINE)
    assert len(shown) >= 4
    told = [line.split() for line in describe(dry_run_settings("--preset", "safety")).splitlines()]
    for name, *numbers in shown:
        assert [*name.split(), *numbers] in told


def test_the_verdicts_in_judging_md_are_those_of_the_defaults_and_of_the_paper() -> None:
    text = page("docs/judging.md")
    found = re.search(r"defaults ask (\d+) one-token verdicts for 17 candidates instead of (\d+)", text)
    assert found is not None
    safety = ("--preset", "safety", "--criteria", "quality=1")
    defaults = ("--judge-schedule", "circulant_bt", "--judge-verdict", "soft")
    assert prompt_cost(dry_run_settings(*safety, *defaults))["judge requests"] == int(found[1])
    assert prompt_cost(dry_run_settings(*safety))["pair judgements"] == int(found[2])
    parser = early_parser()
    assert [parser.get_default(name) for name in ("judge_schedule", "judge_verdict")] == ["circulant_bt", ["soft"]]


def test_judging_md_names_every_criterion_and_every_schedule() -> None:
    text = page("docs/judging.md")
    families = {name.partition(":")[0] for name in known_criteria()}
    assert [name for name in (*sorted(families), *SCHEDULE_NAMES) if f"`{name}`" not in text] == []


def test_every_flag_of_a_preset_is_explained_by_help() -> None:
    explained = {name for action in early_parser()._actions for name in action.option_strings} | megatron_flag_names()
    given = {flag for name in known_presets() for flag, _ in words_by_flag(expand_presets(["--preset", name]))}
    assert given <= explained


def test_defaults_that_the_documentation_states_are_the_parser_s() -> None:
    """As in "`--save-interval` is 100 steps unless given"."""
    parser: argparse.ArgumentParser = early_parser()
    for name in PAGES:
        for flag, value in re.findall(r"`--([a-z-]+)` is ([\d.]+)\b[^.]*?unless given", page(name)):
            assert float(parser.get_default(flag.replace("-", "_"))) == float(value), f"{name}: --{flag}"
