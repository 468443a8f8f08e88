"""A run that is started again goes on in its wandb run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

START = """
import sys
from pathlib import Path
import wandb
from megatron_sip.config.wandb_run import continue_wandb_run
continue_wandb_run(Path(sys.argv[1]))
settings = wandb.setup().settings
if "log" in sys.argv:
    run = wandb.init(project="p", name="n", dir=sys.argv[1], mode="offline")
    wandb.log({"loss": 1.0}, step=3)
    wandb.finish()
    settings = run.settings
print(settings.run_id, settings.resume)
"""


def start(folder: Path, *words: str, **environment: str) -> list[str]:
    """One start, which logs offline with the word "log"; returns the id and the resume mode of its wandb run."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-c", START, str(folder), *words]
    result = subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=120, check=True, cwd=folder.parent
    )
    return result.stdout.splitlines()[-1].split()


def test_every_start_in_a_folder_has_the_same_id_also_offline(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    first, resume = start(folder, "log")
    assert resume == "allow"
    assert start(folder, "log")[0] == first
    offline = list((folder / "wandb").glob("offline-run-*"))
    assert {path.name.rpartition("-")[2] for path in offline} == {first}
    assert start(folder, WANDB_RUN_ID="mine")[0] == "mine"
    assert start(folder)[0] == "mine"
