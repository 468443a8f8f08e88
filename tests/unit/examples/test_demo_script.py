"""examples/demo.sh: the command that it comes to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("bfloat16_pays", "shorter"), [("True", []), ("False", ["--train-iters", "10", "--win-rate-prompts", "48"])]
)
def test_the_demo_is_shorter_on_a_processor_that_computes_in_float32(
    bfloat16_pays: str, shorter: list[str], tmp_path: Path
) -> None:
    """The script with a stand-in for Python, which shows what it is asked for."""
    stub = tmp_path / "python"
    answers = f'case "$1" in -c) echo {bfloat16_pays} ;; tools/fetch*) echo model ;; -m) printf "%s\\n" "$@" ;; esac'
    stub.write_text(f"#!/bin/sh\n{answers}\n")
    stub.chmod(0o755)
    command = ["bash", "examples/demo.sh", "--run-dir", str(tmp_path / "run"), "--", "--train-iters", "3"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shown = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True).stdout
    given = shown.splitlines()
    assert given[given.index("--tensorboard-dir") + 2 :] == [
        *shorter,
        "--train-iters",
        "3",
    ]  # the user's own come last, and win
    assert ("10 steps instead of 32" in shown) == bool(shorter)
