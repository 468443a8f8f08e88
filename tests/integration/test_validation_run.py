"""A whole run of labelled judgements is validated: its numbers are those of transformers on the weights it exports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import lines, steps, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.judge.labelled_tasks import LabelledSettings, make_writer
from megatron_sip.judge.prompts import read_prompt_file
from megatron_sip.serving.launch import LocalServer
from megatron_sip.training.metrics_writer import read_metrics

PROMPT = Path(__file__).parents[2] / "examples" / "short_quality.txt"
LABELS = ("1", "2")
RECORDS = 12
FLAGS = (
    *("--tasks", "judgements", "--objective", "grpo", "--judge-verdict", "soft", "--suffix-length", "1"),
    *(
        "--seq-length",
        "256",
        "--row-length",
        "300",
        "--num-rollouts",
        "4",
        "--train-iters",
        "3",
        "--save-interval",
        "1",
    ),
    *("--eval-interval", "2", "--eval-records", str(RECORDS)),
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a count and a count with a mistake, half of them held out."""
    path = tmp_path_factory.mktemp("records") / "judgements.jsonl"
    lines = []
    for number in range(RECORDS):
        good, bad = f" {number + 3}, {number + 4} and so on.", f" {number}, {number + 7} and so on."
        common = {"criterion": str(PROMPT), "prefix": f"We count: {number + 1}, {number + 2},", "suffix": good}
        common |= {"pair": str(number), "split": ("train", "valid")[number % 2]}
        lines.append(common | {"verdict": "1", "option_1": good, "option_2": bad})
        lines.append(common | {"verdict": "2", "option_1": bad, "option_2": good})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def judge_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, made to say one of the two labels, as the texts and the draws have it."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    asked = tokenizer.encode(read_prompt_file(PROMPT).start, add_special_tokens=False)[-1]
    labels = [tokenizer.encode(label, add_special_tokens=False)[0] for label in LABELS]
    with torch.no_grad():
        own = model.model.embed_tokens.weight[asked]
        own *= 10.0 / own.std()  # so that what comes behind the prompt is mostly this direction,
        way = own / own.norm()
        between = torch.randn(len(way), generator=torch.Generator().manual_seed(1))
        between -= (between @ way) * way  # and the labels differ by what else is there
        model.lm_head.weight.zero_()
        for label, sign in zip(labels, (1.0, -1.0), strict=True):
            model.lm_head.weight[label] = 4.0 * way + sign * between
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def counted_by_transformers(model_dir: Path, records: Path) -> dict[str, float]:
    """The same numbers from the model's likeliest first token after each held-out prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    how = LabelledSettings("judgements", 255, 1, 16_000, "soft", {}, 1234)
    writer = make_writer(how, tokenizer)
    source = LabelledSource(open_records([str(records)], "1,1,0", writer), "valid", writer, seed=1234)
    right: dict[str, list[bool]] = {}
    said: list[str] = []
    for task in source.tasks(0, RECORDS):
        with torch.no_grad():
            best = int(model(torch.tensor([task.prefix_ids])).logits[0, -1].argmax())
        said.append(tokenizer.decode([best]))
        assert task.label is not None
        right.setdefault(task.label.pair, []).append(said[-1] == task.suffix_text)
    read = [label for label in said if label in LABELS]
    return {
        "validation/accuracy/short-quality": sum(map(sum, right.values())) / RECORDS,
        "validation/both-orders/short-quality": sum(map(all, right.values())) / len(right),
        "validation/unread/short-quality": 1 - len(read) / RECORDS,
        "validation/first-option/short-quality": read.count("1") / len(read),
    }


def test_a_run_is_validated_at_its_beginning_at_every_interval_and_at_its_end(
    judge_dir: Path, records: Path, tiny_engine: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where the weights are converted to
    run = tmp_path / "run"
    model = ("--pretrained-checkpoint", str(judge_dir), "--data-path", str(records))
    train(run, *model, *FLAGS, "--rollout-url", tiny_engine.url)
    found = read_metrics(run / "metrics.jsonl")
    validated = [record["step"] for record in found if "validation/accuracy/short-quality" in record]
    assert validated == [0, 2, 3]
    exported = tmp_path / "exported"
    convert = [
        sys.executable,
        "-m",
        "megatron_sip.hf.convert",
        "megatron-to-hf",
        "--load",
        str(run),
        "--save",
        str(exported),
    ]
    subprocess.run(convert, check=True, capture_output=True, timeout=120)
    for place, weights in ((0, judge_dir), (-1, exported)):
        expected = counted_by_transformers(weights, records)
        assert {name: found[place][name] for name in expected} == pytest.approx(expected)
    assert (run / "plots" / "validation_accuracy.png").is_file()
    # What a validation asks is not among the counts of the step behind it.
    trained = [record for record in steps(run) if "loss" in record or "groups" in record]
    assert [record["judge/verdicts/label"] + record["judge/verdicts-missing/label"] for record in trained] == [16] * 3
    before = lines(run)
    train(run, *model, *FLAGS, "--rollout-url", tiny_engine.url)
    assert lines(run)[: len(before)] == before  # the end is measured again, to the same numbers
    assert json.loads(lines(run)[-1]) == json.loads(before[-1])
