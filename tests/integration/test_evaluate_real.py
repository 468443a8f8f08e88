"""megatron-sip-evaluate with a real server: generate, killed and continued; compare, by the real judge; refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sip.evaluate import main
from megatron_sip.evaluation.generation import read_generations
from megatron_sip.evaluation.results import read_results
from megatron_sip.serving.launch import LocalServer

LENGTHS = ("--seq-length", "64", "--suffix-length", "16", "--split", "0,0,1")


def generate_words(server: LocalServer, model: Path, corpus: Path, output: Path, samples: int) -> list[str]:
    where = ["--url", server.url, "--tokenizer", str(model), "--data-path", str(corpus), "--output", str(output)]
    return ["generate", *where, *LENGTHS, "--samples", str(samples)]


@pytest.fixture(scope="module")
def greedy(smollm2_server: LocalServer, smollm2_dir: Path, corpus: Path, tmp_path_factory: Any) -> Path:
    output: Path = tmp_path_factory.mktemp("evaluate") / "greedy.jsonl"
    main(generate_words(smollm2_server, smollm2_dir, corpus, output, 12))
    return output


def test_greedy_generations_are_transformers_own(greedy: Path, smollm2_dir: Path, corpus: Path) -> None:
    """The first token of each, in float32 both here and there, behind the document's own tokens."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    lines = read_generations(greedy).lines
    for line in lines:
        text = next(text for text in texts if line.prefix in text)
        first = text.index(line.prefix)
        tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begins = [begin for begin, _ in tokens.offset_mapping]
        ids = tokens.input_ids[bisect_left(begins, first) : bisect_left(begins, first + len(line.prefix))]
        logits = model(torch.tensor([ids])).logits[0, -1]
        assert int(logits.argmax()) == line.ids[0]
    assert len(lines) == 12


SAMPLES = 32


def test_killed_anywhere_it_goes_on_to_the_same_file(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    """By one call at a time: a batch is four tasks, and the kill comes behind an early one."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    main(generate_words(tiny_llama_server, tiny_llama_dir, corpus, whole, SAMPLES))
    words = [*generate_words(tiny_llama_server, tiny_llama_dir, corpus, output, SAMPLES), "--concurrency", "1"]
    process = subprocess.Popen([sys.executable, "-m", "megatron_sip.evaluate", *words])
    deadline = time.monotonic() + 120
    while not 0 < made(output) < SAMPLES and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert 0 < made(output) < SAMPLES
    main(words)
    assert output.read_bytes() == whole.read_bytes()


def made(output: Path) -> int:
    """Whole generations in a file."""
    return max(0, output.read_bytes().count(b"\n") - 1) if output.exists() else 0


def test_a_model_ties_with_itself_and_beats_noise(
    greedy: Path, smollm2_server: LocalServer, smollm2_dir: Path, tmp_path: Path
) -> None:
    noise = tmp_path / "noise.jsonl"
    header, *lines = greedy.read_text().splitlines()
    spoilt = [json.dumps(json.loads(line) | {"text": " zx qv 7#! pw", "ids": [1]}) for line in lines]
    noise.write_text("\n".join([header, *spoilt]) + "\n")
    judge = ["--teacher-url", smollm2_server.url, "--teacher-tokenizer", str(smollm2_dir), "--criteria", "likelihood=1"]
    results = {}
    for name, base in (("itself", greedy), ("noise", noise)):
        main(["compare", str(base), str(greedy), *judge, "--output", str(tmp_path / f"{name}.json")])
        [results[name]] = read_results(tmp_path / f"{name}.json").results
    assert results["itself"].value == 0.5
    assert results["noise"].value > 0.9
    assert results["noise"].samples == 12
