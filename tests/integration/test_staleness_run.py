"""Whole runs whose experience is made a step ahead, with real Megatron and real SGLang servers, killed and not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from random_kills import (
    AHEAD,
    Kill,
    Victim,
    engine_settings,
    require_each_task_once_a_step_ahead,
    require_equal,
    run_killed,
)
from training import learnt, output, steps, train
from workers import kill_server

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.serving.launch import LocalServer, ServerSettings

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture(scope="module")
def victims(tiny_llama_dir: Path) -> Iterator[dict[Victim, LocalServer]]:
    """An engine and a teacher of this module's own."""
    teacher = ServerSettings(tiny_llama_dir, dtype="float32", max_total_tokens=8192)
    servers: dict[Victim, LocalServer] = {
        "engine": LocalServer(engine_settings(tiny_llama_dir)),
        "teacher": LocalServer(teacher),
    }
    with ThreadPoolExecutor(len(servers)) as threads:
        list(threads.map(LocalServer.start, servers.values()))
    yield servers
    for server in servers.values():
        kill_server(server)


@pytest.fixture(scope="module")
def flags(
    corpus: Path, tiny_llama_dir: Path, tiny_engine: LocalServer, victims: dict[Victim, LocalServer]
) -> tuple[str, ...]:
    return (
        *("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus), *AHEAD),
        *("--rollout-url", tiny_engine.url, victims["engine"].url, "--teacher-url", victims["teacher"].url),
    )


@pytest.fixture(scope="module")
def uninterrupted(
    flags: tuple[str, ...], victims: dict[Victim, LocalServer], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("ahead") / "uninterrupted"
    run_killed(run, flags, [], victims)
    return run


def test_a_step_trains_on_rollouts_by_the_weights_before_the_last_update(uninterrupted: Path) -> None:
    require_each_task_once_a_step_ahead(uninterrupted)
    records = steps(uninterrupted)
    assert len(learnt(records)) == len(records)
    assert "seconds/rollout" in records[0]
    assert all("seconds/ahead/rollout" in record for record in records[1:])
    assert all("seconds/waiting" in record for record in records[:-1])


def test_killed_trainer_engine_and_teacher_change_no_rollout_and_no_number(
    uninterrupted: Path, flags: tuple[str, ...], victims: dict[Victim, LocalServer], tmp_path: Path
) -> None:
    """The trainer once before its first checkpoint, and once between two of them, while experience is under way."""
    kills = [Kill("trainer", 1, 0.1), Kill("engine", 2, 0.1), Kill("trainer", 3, 0.0), Kill("teacher", 5, 0.1)]
    run = tmp_path / "killed"
    run_killed(run, flags, kills, victims)
    assert "successfully loaded checkpoint" in output(run)
    require_each_task_once_a_step_ahead(run)
    require_equal(run, uninterrupted)


def test_a_checkpoint_of_one_step_ahead_goes_on_in_turn(
    uninterrupted: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """What it has ahead is then made again, by the checkpoint's own weights."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / TRACKER).write_text("2")
    told = train(run, *flags, "--train-iters", "3", "--max-staleness", "0")
    assert "from step 3 on with --train-iters 3 (was 8), --max-staleness 0 (was 1)" in told
    assert (
        "experience: the next step's was made ahead by a run of other flags or another version; it is made again"
        in told
    )
    assert [record["staleness"] for record in steps(run)] == [0, 1, 0]
    assert learnt(steps(run))[:2] == learnt(steps(uninterrupted))[:2]
