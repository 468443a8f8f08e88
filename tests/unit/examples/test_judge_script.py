"""examples/train_judge.sh: each of its commands is one that its program understands, in the order from text to figure."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.config.early_checks import check_flags
from megatron_sip.config.presets import expand_presets
from megatron_sip.judge.__main__ import command_line as judge_command_line
from megatron_sip.judge.prompts import read_prompt_file
from megatron_sip.prepare.__main__ import command_line as prepare_command_line

REPO = Path(__file__).parents[3]


def shown_commands(folder: Path, *words: str, finished: bool = True) -> list[list[str]]:
    """What the script runs, with stand-ins for its programs that note what they are asked for."""
    log = folder / "commands"
    note = f'printf "%q " "${{0##*/}}" "$@" >> {log}; echo >> {log}'
    fetched = {"smollm2": "model", "wiki_leads": "leads.jsonl"}
    cases = " ".join(f"tools/fetch_{name}.py) echo {folder}/{made} ;;" for name, made in fetched.items())
    answers = f"case $1 in {cases} esac"
    for name in ("python", "megatron-sip-convert"):
        (folder / name).write_text(f"#!/bin/bash\n{note}\n{answers}\n")
        (folder / name).chmod(0o755)
    run = folder / "run"
    run.mkdir()
    if finished:
        (run / "summary.json").write_text("{}")
        (run / TRACKER).write_text("200")
        with (folder / "megatron-sip-convert").open("a") as stand_in:
            stand_in.write(f"mkdir {run}/judge\n")
    command = ["bash", "examples/train_judge.sh", "--run-dir", str(run), "--", *words]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in log.read_text().splitlines()]


def test_from_text_to_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_model, fetch_text, prepare, train, convert, before, after, figure = shown_commands(tmp_path, "--lr", "2e-5")
    for script in (fetch_model, fetch_text, figure):
        assert (REPO / script[1]).is_file()
    monkeypatch.chdir(REPO)
    made = prepare_command_line().parse_args(prepare[3:])
    assert read_prompt_file(REPO / made.criterion).kind == "pairwise"
    records = tmp_path / "run" / "records" / "judgements.jsonl"
    records.parent.mkdir()
    records.write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    flags = check_flags(expand_presets(train[3:]))
    assert (flags.tasks, flags.objective, flags.lr) == ("judgements", "grpo", 2e-5)  # the user's own come last, and win
    assert flags.data_path == [str(records)]
    assert made.out == str(records.parent)
    assert convert[0] == "megatron-sip-convert"
    judges = [judge_command_line().parse_args(words[3:]) for words in (before, after)]
    assert [judge.model for judge in judges] == [str(tmp_path / "model"), convert[convert.index("--save") + 1]]
    assert {judge.records for judge in judges} == {records}


def test_a_stopped_run_ends_the_script_which_then_goes_on_with_the_same_command(tmp_path: Path) -> None:
    assert shown_commands(tmp_path, finished=False)[-1][2] == "megatron_sip.train"
