"""megatron-sip-evaluate tasks on a real server: lm-eval's own transformers model gives the same numbers; killed, it goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_cases import CHOICE, SCORED, WRITTEN, write_tasks
from transformers import AutoTokenizer

from megatron_sip.evaluate import main
from megatron_sip.evaluation.lm_eval_engine import EngineLM
from megatron_sip.evaluation.lm_eval_tasks import as_results, load_tasks, run_tasks
from megatron_sip.evaluation.results import read_results
from megatron_sip.files import read_json_lines
from megatron_sip.judge.cache import AnswerCache
from megatron_sip.rollout.pool import PoolSettings
from megatron_sip.serving.launch import LocalServer

LENGTH = 96
"""Short, so that texts are cut."""
TEXT = "The road runs from the mill to the sea, and nobody has measured it since the flood. "


@pytest.fixture(scope="module")
def transformers_model(tiny_llama_dir: Path) -> HFLM:
    return HFLM(str(tiny_llama_dir), device="cpu", dtype="float32", batch_size=4, max_length=LENGTH)


@contextlib.contextmanager
def engine(server: LocalServer, model: Path, cache: Path) -> Iterator[EngineLM]:
    with contextlib.closing(AnswerCache(cache)) as answers:
        tokenizer = AutoTokenizer.from_pretrained(model)
        yield EngineLM([server.url], tokenizer, LENGTH, PoolSettings(max_concurrency=8), answers, b"tiny")


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, place) for place, args in enumerate(arguments)]  # type: ignore[arg-type]


def test_log_likelihoods_and_greedy_flags_are_those_of_lm_eval_s_transformers_model(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path, transformers_model: HFLM, tmp_path: Path
) -> None:
    """Several tokens, spaces at the border, no context, one that is cut; what greedy decoding writes, and not."""
    pairs = [(TEXT, word) for word in (" It", " The sea is wide and the mill is old.", "x", " 7")]
    pairs += [("A line that ends in spaces  ", "here"), ("", "No context at all"), (TEXT * 12, " cut")]
    begun = ["One", "The mill and", "Nobody has", TEXT.strip()]
    greedy = [(text, {"until": ["\n"], "max_gen_toks": 1}) for text in begun]
    pairs += zip(begun, transformers_model.generate_until(requests("generate_until", *greedy)), strict=True)
    with engine(tiny_llama_server, tiny_llama_dir, tmp_path / "answers.sqlite") as ours:
        found = ours.loglikelihood(requests("loglikelihood", *pairs))
        blank = ours.loglikelihood(requests("loglikelihood", ("\n ", "gap"), ("", "\n gap")))
    expected = [transformers_model.loglikelihood(requests("loglikelihood", pair))[0] for pair in pairs]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    assert blank[0] == (pytest.approx(blank[1][0], abs=1e-4), blank[1][1])


def test_rolling_log_likelihoods_and_greedy_texts_are_its_own_too(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path, transformers_model: HFLM, tmp_path: Path
) -> None:
    texts = requests("loglikelihood_rolling", (TEXT,), (TEXT * 12,))
    until = requests(
        "generate_until", *((text, {"until": [" t"], "max_gen_toks": 24}) for text in (TEXT, "One", TEXT * 9))
    )
    with engine(tiny_llama_server, tiny_llama_dir, tmp_path / "answers.sqlite") as ours:
        assert ours.loglikelihood_rolling(texts) == pytest.approx(
            transformers_model.loglikelihood_rolling(texts), abs=1e-2
        )
        assert ours.generate_until(until) == transformers_model.generate_until(until)


def test_tasks_of_local_files_have_its_scores_and_few_shot_examples_come_from_the_cache(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path, transformers_model: HFLM, task_files: Path, tmp_path: Path
) -> None:
    tasks = load_tasks([CHOICE, WRITTEN, SCORED], [task_files], num_fewshot=2)
    with engine(tiny_llama_server, tiny_llama_dir, tmp_path / "answers.sqlite") as ours:
        found, metrics = as_results(tasks, run_tasks(ours, tasks, limit=None))
        counts = ours.counts
    expected, other_metrics = as_results(tasks, run_tasks(transformers_model, tasks, limit=None))
    assert found == expected
    assert metrics[SCORED]["word_perplexity"] == pytest.approx(other_metrics[SCORED]["word_perplexity"], rel=1e-3)
    assert [(result.dataset, result.samples) for result in found] == [(CHOICE, 12), (WRITTEN, 12)]
    assert counts["cached_tokens"] > 0.5 * counts["prompt_tokens"]


def test_killed_it_goes_on_offline_and_finished_it_asks_nothing(
    tiny_llama_server: LocalServer, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    output, files = tmp_path / "results" / "tasks.json", write_tasks(tmp_path / "tasks", questions=60)
    where = ["--url", tiny_llama_server.url, "--tokenizer", str(tiny_llama_dir), "--output", str(output)]
    words = ["tasks", *where, "--include-path", str(files), "--tasks", CHOICE, WRITTEN, "--concurrency", "1"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "megatron_sip.evaluate", *words], env=offline)
    deadline = time.monotonic() + 120
    while not kept(output) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not output.exists()
    main(words)
    first = read_results(output)
    assert first.about["requests"]["kept"] > 0
    assert first.about["requests"]["kept"] + first.about["requests"]["asked"] == 4 * 60
    questions = read_json_lines(output.with_name("tasks.json.questions.jsonl"), "questions")
    assert [(line["dataset"], line["task"], line["question"]) for line in questions] == [
        (name, name, place) for name in (CHOICE, WRITTEN) for place in range(60)
    ]
    assert len({(line["task"], line["prompt_hash"]) for line in questions}) == 120
    right = [sum(line[metric] for line in questions if metric in line) / 60 for metric in ("acc", "exact_match")]
    assert right == [result.value for result in first.results]
    main(words)
    again = read_results(output)
    assert again.about["requests"]["asked"] == 0
    assert (again.results, again.about["metrics"]) == (first.results, first.about["metrics"])


def kept(output: Path) -> int:
    """How many answers lie beside a file of results."""
    answers = output.with_name(output.name + ".answers.sqlite")
    if not answers.exists():
        return 0
    with (
        contextlib.closing(sqlite3.connect(f"file:{answers}?mode=ro", uri=True)) as file,
        contextlib.suppress(sqlite3.Error),
    ):
        return int(file.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    return 0
