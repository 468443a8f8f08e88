"""A run on a role's documents of a corpus that `prepare` made of raw text; another corpus is refused when it goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from preloaded import Started
from prepare_cases import run as prepare
from training import COMMON, START_SECONDS, output, why_refused
from workers import launch

pytestmark = pytest.mark.slow

OWN_SPLITS = COMMON[2:]
"""Without --split."""


def test_a_run_reads_its_role_and_does_not_go_on_with_another_corpus(
    corpus: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    texts = ("--data-path", corpus)
    shares = ("--role-shares", "2,1,1", "--split", "8,1,1")
    prepare("text", *texts, "--out", tmp_path / "text")
    prepare("roles", "--data-path", tmp_path / "text", *shares, "--out", tmp_path / "roles")
    manifest = json.loads((tmp_path / "roles" / "manifest.json").read_text())
    run = tmp_path / "run"

    def start(*flags: str) -> subprocess.Popen[Any] | Started:
        own = ("--hf-config", str(tiny_llama_dir), "--data-path", str(tmp_path / "roles"), "--subset", "policy")
        program = ("-m", "megatron_sip.train", *OWN_SPLITS, *own, "--objective", "sft", "--save", str(run), *flags)
        with run.with_suffix(".log").open("ab") as log:
            return launch(*program, output=log)

    assert start("--train-iters", "1").wait(START_SECONDS) == 0, output(run)[-3000:]
    assert f"tasks: documents {manifest['documents']['by_role']['policy/train']}," in output(run)
    refused = why_refused(run, start("--train-iters", "2", "--split", "9,1"))
    assert "--split 9,1: with --subset the corpus has splits of its own" in refused
    (tmp_path / "roles").rename(tmp_path / "before")
    other = ("--role-shares", "1,1,1", "--split", "8,1,1")
    prepare("roles", "--data-path", tmp_path / "text", *other, "--out", tmp_path / "roles")
    refused = why_refused(run, start("--train-iters", "2"))
    assert (
        "was trained on other data or cuts (the flags are the same, so the files or the tokenizer have changed)"
        in refused
    )
