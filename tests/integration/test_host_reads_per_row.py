"""A real step, all of Megatron's schedule, layers and loss: what the host reads of tensors does not grow with the rows."""

from __future__ import annotations

import json
from pathlib import Path

from workers import run_worker, save_tiny_llama

WORKER = Path(__file__).with_name("host_reads_worker.py")


def test_a_step_of_three_rows_reads_no_more_than_one_of_one(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "hf", 1)
    run_worker(WORKER, model, tmp_path / "reads.json")
    reads = json.loads((tmp_path / "reads.json").read_text())
    assert reads.keys() == {"dpo", "grpo"}
    for one_row, three_rows in reads.values():
        assert three_rows == one_row
        assert sum(one_row.values()) > 0  # of the step: the loss is looked at before the update
