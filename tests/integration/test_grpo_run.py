"""Whole runs of GRPO with real Megatron and real SGLang servers: on documents and on labels, killed, continued, replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zstandard
from label_task import SEQ_LENGTH, save_undecided_policy, write_records
from training import kill_when, last_step, lines, output, steps, tracked, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.experience.recording import write_groups
from megatron_sip.hf.converted import converted_checkpoint
from megatron_sip.judge.labelled_tasks import LabelledSettings, make_writer
from megatron_sip.records import Candidate, Group
from megatron_sip.serving.launch import LocalServer

pytestmark = pytest.mark.slow

GRPO = (
    *("--objective", "grpo", "--candidates", "suffix", "rollout", "--num-rollouts", "4", "--branches-per-row", "3"),
    *("--grpo-kl-coef", "0.01", "--ref-update-interval", "2", "--grpo-length", "constant"),
    *("--train-iters", "4", "--save-interval", "1"),
)
TRAINED = ("loss", "grad_norm", "grpo/reward", "grpo/kl", "grpo/sampled_nll", "examples", "rollout_logratio")


@pytest.fixture(scope="module")
def model(corpus: Path, tiny_llama_dir: Path) -> tuple[str, ...]:
    return ("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus))


@pytest.fixture(scope="module")
def recorded(
    model: tuple[str, ...],
    tiny_engine: LocalServer,
    tiny_llama_server: LocalServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run judged by likelihood, its groups in `groups` beside it."""
    run = tmp_path_factory.mktemp("grpo") / "run"
    servers = ("--rollout-url", tiny_engine.url, "--teacher-url", tiny_llama_server.url, "--criteria", "likelihood=1")
    train(run, *model, *GRPO, *servers, "--save-groups", str(run.with_name("groups")))
    return run


def test_a_run_learns_from_all_rollouts_of_its_groups(recorded: Path) -> None:
    records = steps(recorded)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["grpo/kl"] == pytest.approx(0.0, abs=1e-6)  # policy and reference are still equal
    assert records[1]["grpo/kl"] > 1e-6
    for record in records:
        assert record["examples"] == record["groups"] == 4
        assert record["grpo/branches"] == 16
        assert record["grpo/engine_ratio"] == pytest.approx(1.0, abs=1e-3)  # both are float32
        assert record["grpo/corrected_share"] == record["grpo/clipped_fraction"] == 0.0
        assert record["grpo/reward_spread"] > 0
        assert record["grpo/reward"] == pytest.approx(record["score/rollout"])
        assert record["grad_norm"] > 0


def test_killed_and_continued_it_trains_on_the_same_groups_to_the_same_numbers(
    recorded: Path, model: tuple[str, ...], tmp_path: Path
) -> None:
    """From its recorded groups, without servers: sampled rollouts would be others."""
    run = tmp_path / "killed"
    flags = (*model, *GRPO, "--replay-groups", str(recorded.with_name("groups")))
    kill_when(run, lambda: last_step(run) >= 2 and tracked(run) is not None, *flags)
    assert (tracked(run) or 0) >= 1
    first = lines(run)[:1]
    train(run, *flags)
    assert lines(run)[:1] == first
    assert "successfully loaded checkpoint" in output(run)
    for before, after in zip(steps(recorded), steps(run), strict=True):
        assert [after[name] for name in TRAINED] == [before[name] for name in TRAINED]


LABEL_STEPS = 40
LABELS = (
    *("--tasks", "judgements", "--judge-verdict", "soft", "--suffix-length", "1", "--seq-length", str(SEQ_LENGTH)),
    *(
        "--objective",
        "grpo",
        "--num-rollouts",
        "8",
        "--global-batch-size",
        "16",
        "--grpo-oversample",
        "2",
        "--lr",
        "3e-3",
    ),
    *("--lr-warmup-iters", "5", "--train-iters", str(LABEL_STEPS), "--save-interval", "6"),
)


def test_a_tiny_model_learns_a_label_though_killed_in_between(
    tiny_llama_dir: Path, tiny_engine: LocalServer, tmp_path: Path
) -> None:
    """The judge of the paper's section 3.1 in small: from chance to nearly always right, by its own samples alone."""
    records = write_records(tmp_path, 800)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    before = save_undecided_policy(tmp_path / "policy", model, tokenizer, records)
    assert 0.45 <= before <= 0.55
    initial, run = converted_checkpoint(tmp_path / "policy", tmp_path / "converted"), tmp_path / "run"
    flags = (*LABELS, "--data-path", str(records), "--pretrained-checkpoint", str(initial))
    flags = (*flags, "--rollout-url", tiny_engine.url, "--save-groups", str(tmp_path / "groups"))
    kill_when(run, lambda: last_step(run) >= 7 and tracked(run) == 6, *flags)
    six = lines(run)[:6]
    told = train(run, *flags)
    assert lines(run)[:6] == six
    assert "at iteration 6" in told
    found = steps(run)
    assert [record["step"] for record in found] == list(range(1, LABEL_STEPS + 1))
    assert found[0]["grpo/reward"] == pytest.approx(before, abs=0.2)  # 128 samples
    accuracy = found[0]["judge/label/accuracy/colour"]
    assert accuracy == pytest.approx(found[0]["grpo/reward"])
    last = [record["grpo/reward"] for record in found[-5:]]
    assert sum(last) / len(last) >= 0.85, last  # engines draw anew in every run
    assert [record["grpo/truncated"] for record in found] == [
        0.0
    ] * LABEL_STEPS  # the one token of a forced verdict is all of it
    # A learnt label leaves few groups with a spread: further tasks are asked, and the cursor passes all of them.
    rounds = [int(record["grpo/rounds"]) for record in found]
    assert max(rounds) == 2
    drawn = [
        task_indices(tmp_path / "groups", step, number) for step in range(LABEL_STEPS) for number in range(rounds[step])
    ]
    assert drawn == [list(range(first, first + 16)) for first in range(0, 16 * sum(rounds), 16)]


def task_indices(folder: Path, step: int, round_index: int) -> list[int]:
    """Of the tasks that were recorded in a round of a step."""
    name = f"step_{step:07d}" + (f".round_{round_index}" if round_index else "")
    text = zstandard.decompress((folder / f"{name}.replica_0.jsonl.zst").read_bytes()).decode()
    return [json.loads(line)["task"]["index"] for line in text.split("\n") if line]


def test_a_run_with_nothing_left_to_learn_is_a_finished_run_that_the_same_command_leaves_as_it_is(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """From groups that were made up, without servers: those of the first step have a spread, no later ones have."""
    records = write_records(tmp_path, 200)
    settings = LabelledSettings("judgements", max_prompt=SEQ_LENGTH - 1, max_answer=1)
    writer = make_writer(settings, AutoTokenizer.from_pretrained(tiny_llama_dir))
    source = LabelledSource(open_records((str(records),), "70,0,30", writer), "train", writer, settings.seed)
    for step in range(11):
        scores = [1.0, 0.0] if step == 0 else [1.0, 1.0]
        rollouts = [Candidate("rollout", [token], "", [-0.7], str(step)) for token in (5, 6)]
        write_groups(
            tmp_path / "groups", step, 0, [Group(task, rollouts, scores) for task in source.tasks(4 * step, 4)]
        )
    flags = ("--tasks", "judgements", "--suffix-length", "1", "--seq-length", str(SEQ_LENGTH), "--objective", "grpo")
    flags += ("--num-rollouts", "2", "--train-iters", "100", "--hf-config", str(tiny_llama_dir))
    flags += ("--data-path", str(records), "--replay-groups", str(tmp_path / "groups"))
    run = tmp_path / "run"
    assert "nothing left to learn: in 10 steps in a row" in train(run, *flags)
    assert (tracked(run), last_step(run), (run / "report.html").exists()) == (11, 11, True)
    assert json.loads((run / "summary.json").read_text())["steps"] == 11
    (run / "summary.json").unlink()
    assert "nothing left to learn: " + str(run) + " ended so at step 11" in train(run, *flags)
    assert (tracked(run), last_step(run), (run / "summary.json").exists()) == (11, 11, True)
