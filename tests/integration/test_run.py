"""Whole runs of `python -m megatron_sip.train` with real Megatron and real SGLang servers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import kept_port
from safetensors.torch import load_file
from training import (
    kill_when,
    last_step,
    learnt,
    lines,
    output,
    refused,
    screen,
    start,
    steps,
    tracked,
    train,
    wait_until,
    why_refused,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from workers import run_program

from megatron_sip.data.documents import open_corpus
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.experience.leader import CONNECT_SECONDS
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.launch import LocalServer

pytestmark = pytest.mark.slow

TOKENISING = "tokenise "
"""How the progress bar of tokenising starts."""
MODEL_BUILT = "number of parameters on"
"""In Megatron's line about the model that it has built."""
TOTAL_STEPS = 6
HELD_OUT_PREFIXES = 6
"""Of the 30% of the documents that `COMMON` holds out."""
HELD_OUT = (
    *("--eval-interval", "2", "--eval-records", str(HELD_OUT_PREFIXES)),
    *("--eval-suites", "nll", "diversity", "win-rate"),
)
NLL, WIN_RATE = "validation/nll/suffix", "validation/win-rate/initial"


@pytest.fixture(scope="module")
def flags(
    corpus: Path, tiny_llama_dir: Path, tiny_engine: LocalServer, tiny_llama_server: LocalServer
) -> tuple[str, ...]:
    """An online DPO run at temperature 0 on servers that are already there; the teacher's weights stay as they are."""
    return (
        *("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus)),
        *("--objective", "dpo", "--candidates", "suffix", "rollout", "--num-rollouts", "2"),
        *("--rollout-temperature", "0", "--criteria", "likelihood=1", "--ref-update-interval", "3"),
        *("--rollout-url", tiny_engine.url, "--teacher-url", tiny_llama_server.url),
        *("--train-iters", str(TOTAL_STEPS), "--save-interval", "2"),
    )


@pytest.fixture(scope="module")
def uninterrupted(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(run, *flags, fresh=True)
    return run


@pytest.fixture(scope="module")
def two_steps(flags: tuple[str, ...], uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps in one process from the weights of `uninterrupted`, its groups recorded in `groups` beside it."""
    run = tmp_path_factory.mktemp("two_steps") / "run"
    initial = ("--train-iters", "2", "--pretrained-checkpoint", str(uninterrupted))
    train(run, *flags, *initial, "--save-groups", str(run.with_name("groups")))
    return run


def test_a_run_trains_and_logs_every_step(uninterrupted: Path) -> None:
    records = steps(uninterrupted)
    assert [record["step"] for record in records] == list(range(1, TOTAL_STEPS + 1))
    assert records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are still equal: log 2
    assert records[0]["rollout_logratio"] == pytest.approx(0.0, abs=1e-4)
    assert records[1]["rollout_logratio"] != 0.0  # the policy has moved
    for record in records:
        assert record["engine_logprob_abs_diff"] < 1e-3  # both are float32
        assert record["groups"] == 4
        assert record["engines/unsynced"] == 0
        dropped = sum(value for name, value in record.items() if name.startswith("dropped/"))
        assert record.get("examples", 0) + dropped == record["groups"]
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == TOTAL_STEPS
    assert (uninterrupted / "report.html").exists()
    assert MODEL_BUILT in output(uninterrupted)


def test_before_the_first_step_a_run_shows_fewer_than_20_lines_of_its_own(uninterrupted: Path) -> None:
    shown = screen(uninterrupted).splitlines()
    first = next(number for number, line in enumerate(shown) if line.startswith("step 1/"))
    assert first < 20
    assert shown[0] == f"log: {uninterrupted / 'logs' / 'output.log'} (--verbose shows it here)"
    assert not [line for line in shown if MODEL_BUILT in line or "Warning" in line]
    assert "left" not in shown[first]  # nobody knows after one step, which holds what every first step holds
    assert re.search(r"\d+ (s|min) left$", shown[first + 1])


def test_another_model_in_the_run_folder_is_refused_at_once(
    uninterrupted: Path, flags: tuple[str, ...], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 96, "vocab_size": 49280}))
    shown = screen(uninterrupted)
    refused(uninterrupted, *flags, "--hf-config", str(other), "--train-iters", "7")
    last = screen(uninterrupted).removeprefix(shown).splitlines()[-1]
    assert f"{uninterrupted} holds another model than {other}/config.json: " in last
    assert "--ffn-hidden-size 128 there, 96 here, --vocab-size 49152 there, 49280 here" in last


def require_close(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Fails unless both learnt the same: servers batch prompts as they arrive, which moves float32's last digits."""
    for after, before in zip(learnt(found), learnt(expected), strict=True):
        assert after == pytest.approx(before, rel=1e-4, abs=1e-5)


def kill_three_times(run: Path, *flags: str) -> tuple[list[str], list[str]]:
    """kill -9 after step 1, before the first checkpoint; while step 4 is saved; and after step 5. Again if one came too late.

    Returns the lines of metrics.jsonl that the second and the third left of committed steps.
    """
    for _ in range(3):
        shutil.rmtree(run, ignore_errors=True)
        run.with_suffix(".log").unlink(missing_ok=True)
        kill_when(run, lambda: last_step(run) >= 1, *flags)
        if tracked(run) is not None:
            continue
        kill_when(run, (run / "iter_0000004").exists, *flags)
        if tracked(run) != 2:
            continue
        two = lines(run)[:2]
        kill_when(run, lambda: last_step(run) >= 5, *flags)
        if tracked(run) == 4:
            return two, lines(run)[:4]
    pytest.fail("killed too late three times")


def test_killed_anywhere_the_same_command_continues_as_if_nothing_had_happened(
    uninterrupted: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    flags = (*flags, "--ref-offload")  # where the reference's weights lie must not matter either
    two, four = kill_three_times(run, *flags)  # lines hold durations, which no other run has
    assert four[:2] == two
    told = train(run, *flags)  # of all starts: the log goes on
    assert lines(run)[:4] == four
    assert re.findall(r"successfully loaded checkpoint from \S+ .*? at iteration (\d+)", told) == ["2", "4"]
    assert re.search(rf"{run / 'iter_0000004'} (was not committed: removed|is after 2, which)", told)
    require_close(steps(run), steps(uninterrupted))


def test_other_data_than_the_checkpoint_s_is_refused(
    uninterrupted: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    """The cursor would point at other tasks."""
    told = refused(uninterrupted, *flags, "--seed", "99")
    assert "was trained on other data or cuts" in told


def test_a_run_continues_with_another_learning_rate_and_more_steps(
    flags: tuple[str, ...], two_steps: Path, tmp_path: Path
) -> None:
    run = tmp_path / "continued"
    shutil.copytree(two_steps, run)
    new = ("--lr", "5e-4", "--min-lr", "1e-4", "--lr-decay-style", "linear", "--train-iters", "4", "--adam-eps", "1e-6")
    output = train(run, *flags, *new)
    assert "from step 3 on with --lr 0.0005 (was 0.001), --min-lr 0.0001 (was 0.0), --lr-decay-style linear" in output
    assert "--train-iters 4 (was 2), --adam-eps 1e-06 (was 1e-08)" in output
    assert lines(run)[:2] == lines(two_steps)
    rates = [record["learning_rate"] for record in steps(run)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4 + 4e-4 * 2 / 4, 1e-4 + 4e-4 / 4])


def test_recorded_groups_train_the_same_without_any_server(
    flags: tuple[str, ...], uninterrupted: Path, two_steps: Path, tmp_path: Path
) -> None:
    without_servers = [flag for flag in flags if not flag.startswith("http") and not flag.endswith("-url")]
    initial = ("--train-iters", "2", "--pretrained-checkpoint", str(uninterrupted))
    train(tmp_path / "replayed", *without_servers, *initial, "--replay-groups", str(two_steps.with_name("groups")))
    assert learnt(steps(tmp_path / "replayed")) == learnt(steps(two_steps))


def test_an_engine_that_lends_its_memory_to_the_trainer_changes_no_step(
    flags: tuple[str, ...], uninterrupted: Path, two_steps: Path, tmp_path: Path
) -> None:
    place = flags.index("--rollout-url")
    own_engine = ("--rollout-local", "1", "--colocate", "--local-engine-dtype", "float32")
    initial = ("--train-iters", "2", "--pretrained-checkpoint", str(uninterrupted))
    train(tmp_path / "shared", *flags[:place], *own_engine, *flags[place + 2 :], *initial)
    require_close(steps(tmp_path / "shared"), steps(two_steps))
    assert [record["engines/unsynced"] for record in steps(tmp_path / "shared")] == [0, 0]
    [log] = (tmp_path / "shared" / "logs").glob("engine*")
    assert "SIGQUIT" not in log.read_text()  # SGLang's word for an end that nobody asked for


LEARNING = ("--objective", "sft", "--train-iters", "3", "--save-interval", "1")


@pytest.fixture(scope="module")
def unscored(corpus: Path, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded groups of a suffix each, which no preference can be learnt from."""
    folder = tmp_path_factory.mktemp("unscored")
    model = ("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus))
    train(folder / "run", *model, *LEARNING, "--save-groups", str(folder / "groups"))
    return folder / "groups"


@pytest.mark.parametrize("distributed", [False, True])
def test_a_run_saved_before_its_first_update_goes_on_as_one_that_begins(
    corpus: Path, tiny_llama_dir: Path, unscored: Path, tmp_path: Path, distributed: bool
) -> None:
    """Two steps without a usable group leave an optimizer that has not stepped: its checkpoint must be one all the same."""
    common = ["--hf-config", str(tiny_llama_dir), "--data-path", str(corpus), *LEARNING]
    common += ["--use-distributed-optimizer"] if distributed else []
    unusable = ["--objective", "dpo", "--train-iters", "2", "--replay-groups", str(unscored)]
    train(tmp_path / "late", *common, *unusable)
    assert [record["skipped_steps"] for record in steps(tmp_path / "late")] == [1, 1]
    train(tmp_path / "late", *common)
    [_, _, late] = steps(tmp_path / "late")
    assert late["step"] == 3
    assert late["grad_norm"] > 0
    train(tmp_path / "late", *common, "--train-iters", "4")  # with the state of that first update
    assert steps(tmp_path / "late")[3]["grad_norm"] > 0


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    uninterrupted: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(uninterrupted, run)
    shard = max((run / f"iter_{TOTAL_STEPS:07d}").glob("__0_*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert f"{shard} has another checksum than when it was saved" in train(run, *flags, "--load-last-whole")
    require_close(steps(run), steps(uninterrupted))


def test_sigterm_saves_the_last_step_and_exits_0_and_no_other_run_gets_the_folder_before(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    process = start(run, *flags, "--train-iters", "1000", "--save-interval", "1000", fresh=True)
    wait_until(lambda: last_step(run) >= 2, run, process)
    assert f"{run} is in use by process {process.pid} on " in refused(run, *flags)
    os.killpg(process.pid, signal.SIGTERM)  # as SLURM and `timeout` do: to the helper processes too
    assert process.wait(180) == 0
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    assert saved == steps(run)[-1]["step"] >= 2


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(4, ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")), (2, ())],
    ids=["tp2-pp2", "dp2"],
)
def test_parallel_runs_do_the_same_steps(
    flags: tuple[str, ...],
    uninterrupted: Path,
    two_steps: Path,
    tmp_path: Path,
    processes: int,
    layout: tuple[str, ...],
) -> None:
    run = tmp_path / "parallel"
    initial = ("--pretrained-checkpoint", str(uninterrupted))  # it gives every layout the same weights
    # One of them under torchrun itself.
    train(run, *flags, *initial, *layout, "--train-iters", "2", processes=processes, fresh=processes == 2)
    for before, after in zip(learnt(steps(two_steps)), learnt(steps(run)), strict=True):
        assert after == pytest.approx(before, rel=1e-3, abs=1e-4)


def nll_by_transformers(model: Any, folder: Path, corpus: Path) -> float:
    """Nats a token of the suffixes that `HELD_OUT` measures."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = open_corpus([str(corpus)], tokenizer, TokenizeSettings()).split("70,0,30")["test"]
    how = TaskSettings(seq_length=96, suffix_length=24, min_prefix_length=16)
    tasks = TaskSource(documents, tokenizer, how).tasks(0, HELD_OUT_PREFIXES)
    total = 0.0
    for task in tasks:
        with torch.no_grad():
            logits = model(torch.tensor([[*task.prefix_ids, *task.suffix_ids]])).logits[0]
        about = logits[len(task.prefix_ids) - 1 : -1].log_softmax(-1)
        total -= float(about[torch.arange(len(task.suffix_ids)), torch.tensor(task.suffix_ids)].sum())
    return total / sum(len(task.suffix_ids) for task in tasks)


def test_the_engine_serves_what_was_trained_and_measures_it_on_held_out_text(
    uninterrupted: Path, flags: tuple[str, ...], corpus: Path, tiny_engine: LocalServer, tmp_path: Path
) -> None:
    """After a run the engine's greedy continuation, and the last held-out NLL, are those of the exported checkpoint in
    transformers."""
    prompts = tmp_path / "toxigen.jsonl"
    prompts.write_text(
        "".join(json.dumps({"text": f"People of {place} are"}) + "\n" for place in ("Rome", "Bern", "Oslo"))
    )
    held_out = (*HELD_OUT, f"toxigen={prompts}", "--judge-max-tokens", "8", "--eval-by-training-judge")
    train(tmp_path / "run", *flags, *held_out, "--train-iters", "2", "--weight-sync", "disk")
    measured = {step["step"]: step for step in map(json.loads, lines(tmp_path / "run")) if NLL in step}
    assert list(measured) == [0, 2]
    assert 0 < measured[2]["validation/diversity/distinct-3"] <= 1
    assert WIN_RATE not in measured[0]
    assert (
        measured[2]["validation/failed/no verdict"] == 3
    )  # of the set: a random judge writes none, which is no rating
    assert 0 <= measured[2][WIN_RATE] <= 1
    assert "validation_text.png" in {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    exported = tmp_path / "hf"
    converter = ("-m", "megatron_sip.hf.convert", "megatron-to-hf")
    done = run_program(*converter, "--load", str(tmp_path / "run"), "--save", str(exported))
    assert done.returncode == 0, done.stdout
    assert AutoConfig.from_pretrained(exported).vocab_size == 49152
    assert load_file(exported / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert measured[2][NLL] == pytest.approx(nll_by_transformers(model, exported, corpus), rel=1e-4)
    prompt = AutoTokenizer.from_pretrained(exported).encode("The with statement wraps the execution of a block")
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 12, "temperature": 0}}
    found = call(tiny_engine.url, "POST", "/generate", body, timeout_s=60.0)
    assert found["output_ids"][: len(expected)] == expected
    assert found["meta_info"]["weight_version"] == f"{(tmp_path / 'run' / 'run_id').read_text().strip()}-2"


def test_steps_with_suffix_rewrite_and_rollouts_under_several_criteria(
    flags: tuple[str, ...], smollm2_server: LocalServer, tmp_path: Path
) -> None:
    """The paper's full method: a real post-trained model rewrites, ahead of the policy, and judges."""
    run = tmp_path / "full"
    teacher = ("--teacher-url", smollm2_server.url, "--criteria", "quality=1", "safety=1", "likelihood=1")
    candidates = ("--candidates", "suffix", "rewrite", "rollout", "--rollout-temperature", "1")
    train(
        run, *flags, *teacher, *candidates, "--train-iters", "2", "--global-batch-size", "2", "--save-groups", str(run)
    )
    records = steps(run)
    rewritten = ("rewriter/rewrites", "rewriter/copies", "rewriter/dropped")
    for record in records:
        dropped = sum(value for name, value in record.items() if name.startswith("dropped/"))
        assert record.get("examples", 0) + dropped == record["groups"] == 2
        assert record["judge/verdicts/quality"] > 0
        assert record["judge/verdicts/safety"] > 0
    assert sum(value for record in records for name, value in record.items() if name.startswith(rewritten)) == 4
    assert len(list(run.glob("step_000000?.replica_0.jsonl.zst"))) == 2


def test_a_server_that_is_down_is_named_before_anything_slow(flags: tuple[str, ...], tmp_path: Path) -> None:
    """An engine and a teacher, of two runs beside each other: each waits for an answer as long as it does."""
    text = tmp_path / "new.jsonl"  # not among the token files that are kept from other runs
    text.write_text(json.dumps({"text": "One text that nobody has tokenised yet. " * 100}) + "\n")
    urls = {server: f"http://127.0.0.1:{kept_port()}" for server in ("--rollout-url", "--teacher-url")}
    started = {
        server: start(tmp_path / server, *flags, server, url, "--data-path", str(text)) for server, url in urls.items()
    }
    for server, process in started.items():
        told = why_refused(tmp_path / server, process)
        assert urls[server] in told
        assert f"within {CONNECT_SECONDS:.0f} s" in told
        assert TOKENISING not in told
        assert MODEL_BUILT not in told


def test_a_broken_line_is_named_before_anything_is_trained(flags: tuple[str, ...], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": "cut off\n')
    told = refused(tmp_path / "broken", *flags, "--data-path", str(broken))
    assert "broken.jsonl:2: not valid JSON" in told
    assert TOKENISING in told
    assert MODEL_BUILT not in told


def test_another_vocabulary_than_the_engine_is_refused(
    flags: tuple[str, ...], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    config = AutoConfig.from_pretrained(tiny_llama_dir)
    config.vocab_size = 49280
    config.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(other)
    told = refused(tmp_path / "vocabulary", *flags, "--hf-config", str(other))
    assert "49280" in told
    assert "49152" in told
