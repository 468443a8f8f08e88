"""The demo as a user runs it, on text of their own: examples/demo.sh with the real SmolLM2 in bf16, only fewer steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import steps
from transformers import AutoTokenizer

pytestmark = [pytest.mark.server, pytest.mark.slow]

REPO = Path(__file__).parents[2]
STEPS, PROMPTS = 3, 4
KEYS = {"SIP_TEACHER_KEY": "sk-teacher-6f1d0c5b9a", "SIP_ENGINE_KEY": "sk-engine-2e8a7740fd"}
"""API keys by their variables; the local servers demand none, but are sent them."""
SETTINGS = (
    *("--teacher-key-variable", "SIP_TEACHER_KEY", "--rollout-key-variable", "SIP_ENGINE_KEY"),
    *("--train-iters", str(STEPS), "--win-rate-prompts", str(PROMPTS), "--global-batch-size", "4"),
    *("--num-rollouts", "2", "--lr-warmup-iters", "1"),
)


def write_documents(path: Path) -> int:
    """A document for every 1,500 characters or so of Python's reference; returns how many there are."""
    documents, text = [], ""
    for paragraph in "\n\n".join(topics.values()).split("\n\n"):
        text += paragraph + "\n\n"
        if len(text) > 1500:
            documents.append(text)
            text = ""
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return len(documents)


def environment(home: Path) -> dict[str, str]:
    """As after `source .venv/bin/activate`, on a machine where nobody is logged in to wandb."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return (
        kept | KEYS | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NETRC": str(home / "no-netrc")}
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """The run folder of a finished demo."""
    folder = tmp_path_factory.mktemp("demo")
    assert write_documents(folder / "reference.jsonl") > 200
    run = folder / "run"
    wandb = ("--wandb-project", "demo", "--wandb-exp-name", "demo", "--wandb-save-dir", str(run))
    with (folder / "demo.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "examples/demo.sh", "--run-dir", str(run), "--data", f"{folder}/*.jsonl", "--", *SETTINGS, *wandb],
            cwd=REPO,
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(1200)
        finally:
            process.kill()  # its servers end with it
    assert status == 0, (folder / "demo.log").read_text(errors="replace")[-6000:]
    return run


def test_no_key_stands_in_any_file_of_a_run(demo: Path) -> None:
    files = [path for path in demo.parent.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    assert {".log", ".jsonl", ".json", ".html", ".wandb", ".distcp", ".safetensors"} <= suffixes
    assert "sip_teacher_key" in (demo / "run.json").read_text().casefold()  # the variable is kept
    keys = [key.encode() for key in KEYS.values()]
    assert [path for path in files if any(key in path.read_bytes() for key in keys)] == []


def test_the_screen_shows_our_own_lines_and_names_the_log_of_the_rest(demo: Path) -> None:
    shown = demo.with_name("demo.log").read_text(errors="replace").splitlines()
    first = next(number for number, line in enumerate(shown) if line.startswith("step 1/"))
    assert first < 20, shown[:first]
    assert f"log: {demo / 'logs' / 'output.log'} (--verbose shows it here)" in shown
    assert len(shown) < first + STEPS + 10, shown[first:]
    assert len((demo / "logs" / "output.log").read_text(errors="replace").splitlines()) > 500


def test_the_trained_model_is_a_hugging_face_folder(demo: Path, smollm2_dir: Path) -> None:
    trained, initial = (load_file(folder / "model.safetensors") for folder in (demo / "hf", smollm2_dir))
    assert set(trained) == set(initial)
    assert any(not torch.equal(trained[name], initial[name]) for name in trained)
    assert AutoTokenizer.from_pretrained(demo / "hf")("text") == AutoTokenizer.from_pretrained(smollm2_dir)("text")


def test_the_run_folder_says_how_it_was_started_and_keeps_samples(demo: Path) -> None:
    record = json.loads((demo / "run.json").read_text())
    assert record["command"].startswith("megatron-sip ")
    assert record["settings"]["--train-iters"] == str(STEPS)
    assert [json.loads(line)["step"] for line in (demo / "samples.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_summary_compares_the_policies(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["seconds"] > 0
    assert summary["prompts"] == PROMPTS
    low, high = summary["win_rate_ci95"]
    assert 0 <= low <= summary["win_rate"] <= high <= 1
    assert summary["control"]["temperature"] == 0.7
    assert 0 <= summary["control"]["win_rate"] <= 1
    assert all(0 < share <= 1 for share in summary["distinct_3"])
    assert all(0 < nats < 5 for nats in summary["suffix_nll"])
    assert 0 <= summary["final_rollout_chosen_rate"] <= 1


def test_engine_and_trainer_agree_after_every_sync(demo: Path) -> None:
    """The rollouts of step t come from the weights pushed after step t - 1."""
    records = steps(demo)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert record["engine_tokens"] > 0
        assert record["grad_norm"] > 0
    # Means over the tokens of a step, in nats; both compute in bf16, or in float32.
    assert mean(record["engine_logprob_abs_diff"] for record in records) <= 0.03


def test_report_and_plots_are_drawn(demo: Path) -> None:
    assert "data:image/png;base64," in (demo / "report.html").read_text()
    plots = {path.stem: path.read_bytes() for path in (demo / "plots").glob("*.png")}
    assert {"loss", "scores", "rollout_chosen_rate", "engine_difference"} <= set(plots)
    assert all(content.startswith(b"\x89PNG\r\n") for content in plots.values())


def test_tensorboard_holds_what_metrics_jsonl_holds(demo: Path) -> None:
    events = EventAccumulator(str(demo / "tensorboard"))
    events.Reload()
    for name in ("loss", "score/rollout", "engine_logprob_abs_diff", "seconds/total"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        # tensorboard keeps float32
        assert found == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in steps(demo)]


def test_wandb_wrote_an_offline_run(demo: Path) -> None:
    (run,) = (demo / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
