"""The wandb run of a run folder: each start of the same command continues it."""

from __future__ import annotations

import secrets
from pathlib import Path

from megatron_sip.files import write_atomically

FILE = "wandb_run_id"


def continue_wandb_run(run_dir: Path) -> None:
    """Let the next wandb.init continue the run whose id `run_dir` keeps, online or offline; the first start makes one.

    An id chosen by WANDB_RUN_ID or in wandb's settings files stays, and is kept as well. Raises OSError.
    """
    import wandb

    path = run_dir / FILE
    chosen = wandb.setup().settings.run_id
    kept = path.read_text().strip() if path.exists() else ""
    run_id = chosen or kept or secrets.token_hex(4)
    if run_id != kept:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, run_id + "\n")
    wandb.setup(settings=wandb.Settings(run_id=run_id, resume="allow"))
