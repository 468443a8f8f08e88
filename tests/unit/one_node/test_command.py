"""The command for one node: how it is understood, its processes and signals, and the files around the trainer's."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workers import is_running

from megatron_sip.config.early_checks import check_flags
from megatron_sip.errors import ArgumentError
from megatron_sip.one_node import command as one_node
from megatron_sip.one_node.command import layout_flags, local_servers, understand
from megatron_sip.one_node.layout import Layout
from megatron_sip.one_node.ranks import LocalRanks, rank_variables
from megatron_sip.serving.local_servers import server_gpus

RUN = """
import sys
from megatron_sip.one_node.ranks import LocalRanks
sys.exit(LocalRanks([sys.executable, "-c", sys.argv[1]]).wait())
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "Llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    return folder


def checked(words: list[str], layout: Layout) -> argparse.Namespace:
    """The trainer's flags that a command comes to, as its early parser reads them."""
    request = understand(words)
    flags = [*request.flags, *layout_flags(layout, request.flags), "--hf-config", str(request.model)]
    return check_flags(flags)


def test_model_texts_and_teacher_are_enough(model: Path) -> None:
    args = checked([str(model), "a.jsonl", "b/*.jsonl", "--teacher", str(model)], Layout(4, 2, 3, 5))
    assert args.data_path == ["a.jsonl", "b/*.jsonl"]
    assert (args.run_dir, args.save) == ("runs/Llama", "runs/Llama/checkpoints")
    assert (args.teacher_model, args.rollout_local, args.tensor_model_parallel_size) == (str(model), 3, 2)
    assert args.teacher_replicas == 5
    assert (args.train_iters, args.judge_votes) == (2000, 5)  # of the preset continual


def test_a_user_s_own_flags_win(model: Path) -> None:
    own = ["--preset", "safety", "--train-iters", "7", "--tensor-model-parallel-size", "4", "--run-dir", "r"]
    args = checked([str(model), "a.jsonl", "--teacher", str(model), *own], Layout(4, 1, 3, 1, server_memory=0.3))
    assert (args.train_iters, args.tensor_model_parallel_size, args.run_dir) == (7, 4, "r")
    assert args.local_server_memory == 0.3
    elsewhere = ["--rollout-url", "http://e:1", "--teacher-url", "http://t:1"]
    args = checked([str(model), "a.jsonl", *elsewhere], Layout(8, 1, 0, 0))
    assert args.teacher_replicas == 1
    assert (args.rollout_local, args.teacher_model, args.rollout_url) == (0, None, ["http://e:1"])
    assert local_servers(elsewhere) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["MODEL"], "a model folder and texts come first"),
        (["nowhere", "a.jsonl"], "nowhere: no config.json there"),
        (["MODEL", "a.jsonl", "--teacher"], "--teacher takes one folder, not 0"),
        (["MODEL", "a.jsonl", "--run-dir", "a", "b"], "--run-dir takes one folder, not 2"),
        (["MODEL", "a.jsonl", "--save", "r"], "--save: .*RUN_DIR/checkpoints.* give --run-dir"),
        (["MODEL", "a.jsonl", "--pretrained-checkpoint=c"], "--pretrained-checkpoint: the first word names the model"),
    ],
)
def test_what_is_missing_is_named(model: Path, words: list[str], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        understand([str(model) if word == "MODEL" else word for word in words])


def test_help_and_mistakes_come_at_once_without_torch(model: Path) -> None:
    code = "import sys; from megatron_sip.one_node.command import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "megatron-sip HF_DIR" in done.stdout
    assert done.stdout.endswith("False\n")
    wrong = [str(model), "a.jsonl", "--teacher", str(model), "--num-rollots", "3", "--dpo-beta", "x"]
    done = subprocess.run([sys.executable, "-c", code, *wrong], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "is --num-rollouts meant?" in done.stderr
    assert "--dpo-beta: invalid float value" in done.stderr
    assert done.stdout == "False\n"


def test_the_trained_model_is_exported_once_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(load: Path, save: Path) -> None:
        calls.append(load)
        save.mkdir(parents=True)
        (save / "config.json").write_text(str(len(calls)))

    monkeypatch.setattr(one_node, "run_converter", convert)
    tracker = tmp_path / "checkpoints" / one_node.TRACKER
    tracker.parent.mkdir()
    tracker.write_text("3")
    for _ in range(2):
        one_node.export(tmp_path)
    assert calls == [tmp_path / "checkpoints"]
    later = time.time() + 10
    os.utime(tracker, (later, later))
    one_node.export(tmp_path)
    assert (tmp_path / "hf" / "config.json").read_text() == "2"
    os.utime(tracker, (later + 10, later + 10))
    monkeypatch.setattr(one_node, "run_converter", lambda *_: sys.exit(1))
    with pytest.raises(SystemExit):
        one_node.export(tmp_path)
    assert (tmp_path / "hf" / "config.json").read_text() == "2", "the model of before stays until another is whole"


def test_servers_get_gpus_of_their_own_or_share_what_the_trainer_leaves() -> None:
    assert server_gpus(4, 4, None) == (4, 5, 6, 7)
    assert server_gpus(1, 2, shared=2) == (1, 1)
    assert server_gpus(1, 2, shared=1) == (0, 0)
    assert server_gpus(1, 3, shared=3) == (1, 2, 1)


def test_processes_learn_their_rank_and_the_first_failure_ends_them_all(tmp_path: Path) -> None:
    assert rank_variables(1, None) == [{}]
    code = (
        "import os, pathlib, sys, time; rank = os.environ['RANK']; "
        f"pathlib.Path(r'{tmp_path}', rank).write_text(os.environ['WORLD_SIZE'] + os.environ['MASTER_PORT']); "
        "sys.exit(7) if rank == '1' else time.sleep(60)"
    )
    started = time.monotonic()
    assert LocalRanks([sys.executable, "-c", code], 3).wait() == 7
    assert time.monotonic() - started < 40
    assert (tmp_path / "1").read_text().startswith("3")


def test_ctrl_c_before_there_is_a_trainer_leaves_no_traceback(model: Path) -> None:
    code = (
        "import signal; from megatron_sip.one_node import command as one_node\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "one_node.lay_out = lambda *_: signal.raise_signal(signal.SIGINT)\n"  # os.kill's may be another thread's, and late
        "one_node.main()"
    )
    words = [str(model), "a.jsonl", "--teacher", str(model)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_child_and_its_status_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    child = (
        "import pathlib, signal, sys, time\n"
        "for n in (signal.SIGTERM, signal.SIGINT): signal.signal(n, lambda number, _: sys.exit(number))\n"
        f"pathlib.Path(r'{tmp_path}', 'ready').touch(); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", RUN, child])
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(number)
    assert parent.wait(30) == number


def test_the_child_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    child = f"import os, pathlib, time; pathlib.Path(r'{tmp_path}', 'pid').write_text(str(os.getpid())); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", RUN, child])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "pid").read_text())
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
