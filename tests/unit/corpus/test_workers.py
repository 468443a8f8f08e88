"""Work on shards in several processes: all of it, with its counts; an error or a death ends it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from megatron_sip.corpus.folder import CorpusError
from megatron_sip.corpus.workers import Tick, work_on
from megatron_sip.errors import DataError

SIZE = 10_000_000
"""Of a made-up shard: worth a process."""


def upper(out: Path, shard: str, tick: Tick) -> None:
    """Work on a shard; "die" ends the process, "fail" raises."""
    if shard == "die":
        os._exit(1)
    if shard == "fail":
        raise DataError("fail.jsonl: broken")
    (out / shard).write_text(shard.upper())
    tick(1, SIZE)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_shard_is_worked_on_once_and_counted(
    processes: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = [f"shard{number}" for number in range(5)]
    work_on(shards, partial(upper, tmp_path), processes, 5 * SIZE, "upper")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {shard: shard.upper() for shard in shards}
    last = capfd.readouterr().err.split("\r")[-1]
    assert "100%" in last
    assert "documents=5" in last


@pytest.mark.parametrize(("shard", "error", "says"), [("die", CorpusError, "--workers"), ("fail", DataError, "broken")])
def test_an_error_in_a_process_ends_all_and_is_told(
    shard: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        work_on(["a", shard, "b"], partial(upper, tmp_path), 2, 3 * SIZE, "upper")
