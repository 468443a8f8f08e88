"""Every suite of megatron-sip-evaluate with a real SGLang server as model and judge, on small files in the public formats."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from set_files import write_set
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sip.data.documents import open_corpus
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.evaluate import main
from megatron_sip.evaluation.generation import read_generations
from megatron_sip.evaluation.results import Result, read_results
from megatron_sip.evaluation.suites.prompt_sets import PROMPT_SETS
from megatron_sip.serving.launch import LocalServer

COUNT, MANY = 3, 80
SETS = [name for name in PROMPT_SETS if name not in ("unsafe", "prefixes")]  # they are read as standard is
PAIRWISE = {"standard": "coherence", "factscore": "factscore"} | {
    f"halueval-{part}": "halueval" for part in ("qa", "dialogue", "summarization")
}
"""The sets that answers are compared on, and the criterion; the others are rated."""


def only_result(path: Path) -> Result:
    [result] = read_results(path).results
    return result


def model_words(server: LocalServer, model: Path) -> list[str]:
    return ["--url", server.url, "--tokenizer", str(model)]


@pytest.fixture(scope="module")
def generated(smollm2_server: LocalServer, smollm2_dir: Path, tmp_path_factory: Any) -> dict[str, Path]:
    """A file of generations for each set."""
    folder, files = tmp_path_factory.mktemp("sets"), {}
    for name in SETS:
        path, wikipedia = write_set(folder, name, COUNT)
        files[name] = folder / f"{name}.generations.jsonl"
        words = ["--set", f"{name}={path}", "--output", str(files[name]), "--suffix-length", "8"]
        words += ["--wikipedia", str(wikipedia)] if wikipedia else []
        main(["generate", *model_words(smollm2_server, smollm2_dir), *words])
    return files


@pytest.mark.parametrize("name", SETS)
def test_a_set_runs_from_its_file_to_its_number(
    name: str, generated: dict[str, Path], smollm2_server: LocalServer, smollm2_dir: Path, tmp_path: Path
) -> None:
    """By soft verdicts: the small judge writes none that can be read. A model ties with itself, and unasked."""
    made, output = read_generations(generated[name]), tmp_path / "result.json"
    assert made.header["dataset"] == name
    assert len(made.lines) == COUNT
    assert all(1 <= len(line.ids) <= 8 for line in made.lines)
    judge = ["--teacher-url", smollm2_server.url, "--teacher-tokenizer", str(smollm2_dir), "--judge-verdict", "soft"]
    words = [*judge, "--output", str(output)]
    if name in PAIRWISE:
        other = tmp_path / "other.jsonl"
        header, *lines = generated[name].read_text().splitlines()
        spoilt = [json.dumps(json.loads(line) | {"text": " zx qv 7#! pw"}) for line in lines]
        other.write_text("\n".join([header, *spoilt]) + "\n")
        criterion = ["--criteria", PAIRWISE[name]]
        main(["compare", str(generated[name]), str(generated[name]), *criterion, *words])
        assert only_result(output).value == 0.5
        main(["compare", str(other), str(generated[name]), *criterion, *words])
    else:
        criterion = ["--criteria", "factuality:v4" if name == "slimpajama" else "safety"]
        main(["rate", str(generated[name]), *criterion, *words])
    result = only_result(output)
    assert (result.dataset, result.samples, result.failed) == (name, COUNT, 0)
    assert result.interval is not None
    assert 0 <= result.interval[0] <= result.value <= result.interval[1] <= 1
    about = read_results(output).about
    assert about["model"] == str(smollm2_dir)  # as the engine says
    assert about["judged"][0]["judgements"] == (2 if name in PAIRWISE else 1) * COUNT


def test_a_rating_that_is_killed_asks_only_for_what_it_lacks(
    generated: dict[str, Path], smollm2_server: LocalServer, smollm2_dir: Path, tmp_path: Path
) -> None:
    """kill -9 once an answer is on the disk; the same command ends as one that was never stopped."""
    many = tmp_path / "many.jsonl"
    header, *lines = generated["standard"].read_text().splitlines()
    texts = [json.loads(lines[i % COUNT]) | {"index": i, "text": f" version {i} of this"} for i in range(MANY)]
    many.write_text("\n".join([header, *map(json.dumps, texts)]) + "\n")
    judge = ["--teacher-url", smollm2_server.url, "--teacher-tokenizer", str(smollm2_dir), "--judge-verdict", "soft"]
    words = ["rate", str(many), *judge, "--judge-concurrency", "8", "--output", str(tmp_path / "rate.json")]
    process = subprocess.Popen([sys.executable, "-m", "megatron_sip.evaluate", *words])
    answers, deadline = tmp_path / "rate.json.answers.sqlite", time.monotonic() + 120
    while not kept(answers) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    before = kept(answers)
    assert 0 < before < MANY
    main(words)
    found = read_results(tmp_path / "rate.json")
    assert found.about["judged"][0]["answers kept from before"] == before
    assert (found.results[0].samples, kept(answers)) == (MANY, MANY)


def kept(path: Path) -> int:
    """Answers in a judge's cache."""
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(path) as database:
            [[count]] = database.execute("SELECT COUNT(*) FROM answers")
            return int(count)
    except sqlite3.OperationalError:  # not yet made, or locked
        return 0


def test_nll_is_transformers_own(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    """In float32 to 1e-3 nats a token, of suffixes and of documents; a second run reads what the first measured."""
    output, samples = tmp_path / "nll.json", 24
    lengths = ["--seq-length", "64", "--suffix-length", "16", "--split", "0,0,1", "--samples", str(samples)]
    words = ["nll", *model_words(tiny_llama_server, tiny_llama_dir), "--data-path", str(corpus), *lengths]
    main([*words, "--output", str(output)])
    found = {result.dataset: result for result in read_results(output).results}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    documents = open_corpus([str(corpus)], tokenizer).split("0,0,1")["test"]
    settings = {"suffix": TaskSettings(64, 16, min_prefix_length=16), "document": TaskSettings.whole(64, seed=1234)}
    for dataset, how in settings.items():
        tokens, nats = 0, 0.0
        for task in TaskSource(documents, tokenizer, how).tasks(0, samples):
            ids, first = torch.tensor([[*task.prefix_ids, *task.suffix_ids]]), len(task.prefix_ids)
            with torch.no_grad():
                table = model(ids).logits[0].double().log_softmax(-1)
            nats -= sum(table[place - 1, ids[0, place]].item() for place in range(first, ids.shape[1]))
            tokens += len(task.suffix_ids)
        assert found[dataset].value == pytest.approx(nats / tokens, abs=1e-3)
        assert read_results(output).about[f"{dataset} tokens"] == tokens
    before = output.read_bytes()
    main([*words, "--output", str(output)])
    assert output.read_bytes() == before


def test_a_folder_is_served_and_measured_as_where_it_is_served_already(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    lengths = ["--seq-length", "64", "--suffix-length", "16", "--split", "0,0,1", "--samples", "4", "--of", "suffix"]
    models = {"url": model_words(tiny_llama_server, tiny_llama_dir)}
    models["folder"] = ["--model", str(tiny_llama_dir), "--dtype", "float32"]
    found = {}
    for name, model in models.items():
        output = tmp_path / name / "nll.json"
        main(["nll", *model, "--data-path", str(corpus), *lengths, "--output", str(output)])
        found[name] = only_result(output).value
        assert read_results(output).about["model"] == str(tiny_llama_dir)
    assert found["folder"] == pytest.approx(found["url"], abs=1e-4)
