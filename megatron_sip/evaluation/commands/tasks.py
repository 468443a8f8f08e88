"""Standard tasks of a model, by lm-eval on our own engines."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import orjson

from megatron_sip.errors import DataError
from megatron_sip.evaluation.results import write_results
from megatron_sip.evaluation.served_model import Model, add_model_flags, engines_of, open_model, pool_settings
from megatron_sip.files import write_atomically
from megatron_sip.judge.cache import AnswerCache
from megatron_sip.serving.blocking_call import call
from megatron_sip.serving.failures import RequestError
from megatron_sip.serving.local_servers import ENGINE_MARGIN

ABOUT = "standard tasks by lm-eval: BoolQ, PIQA, MMLU, TruthfulQA and whatever else it has"
CALL_S = 60.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Model, tasks, output."""
    add_model_flags(parser)
    parser.add_argument(
        "--tasks", nargs="+", required=True, help="lm-eval's names, or standard (the paper's eight), truthfulqa"
    )
    parser.add_argument("--include-path", nargs="+", type=Path, default=[], help="folders of task files, which win")
    parser.add_argument("--num-fewshot", type=int, help="examples before a question; default: 5 for mmlu, else none")
    parser.add_argument("--limit", type=int, help="most questions of a task, from its first one on")
    parser.add_argument("--max-length", type=int, help="most tokens that the model sees; default: what it can")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file of results; beside it each question's, and answers"
    )


def run(given: argparse.Namespace) -> None:
    """Load the tasks, serve the model if need be, ask, write the results."""
    for flag, least in (("limit", 1), ("max_length", 1), ("num_fewshot", 0)):
        if (value := getattr(given, flag)) is not None and value < least:
            raise DataError(f"--{flag.replace('_', '-')} {value}: at least {least} is needed")
    # lm-eval takes two seconds to import, which no other command needs to wait for.
    from megatron_sip.evaluation.lm_eval_engine import EngineLM
    from megatron_sip.evaluation.lm_eval_tasks import as_results, load_tasks, questions_of, run_tasks

    tasks = load_tasks(given.tasks, given.include_path, given.num_fewshot)
    model = open_model(given)
    known = given.max_length or (model_length(model) if model.folder is not None else 0)
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(engines_of(model, given, given.output, known + 1))
        length = known or min(map(engine_length, urls))
        answers = AnswerCache(given.output.with_name(given.output.name + ".answers.sqlite"), pending_limit=64)
        stack.enter_context(contextlib.closing(answers))
        engine = EngineLM(
            urls,
            model.tokenizer,
            length,
            pool_settings(given, len(model.tokenizer)),
            answers,
            answers_key(model, length),
        )
        started = time.monotonic()
        try:
            found = run_tasks(engine, tasks, given.limit)
        except RequestError as error:
            told = f"{error.detail}. What was answered is kept: once the engine answers, the same command goes on"
            raise RequestError(error.kind, told) from error
        seconds = round(time.monotonic() - started, 1)
    results, metrics = as_results(tasks, found)
    about = model.header() | {
        "tasks": "lm-eval",
        "limit": given.limit,
        "max_length": length,
        "few_shot": {name: found["n-shot"][leaves[0]] for name, leaves in tasks.groups.items()},
        "metrics": metrics,
        "requests": dict(engine.counts),
        "seconds": seconds,
    }
    lines = "".join(json.dumps(line) + "\n" for line in questions_of(tasks, found))
    write_atomically(given.output.with_name(given.output.name + ".questions.jsonl"), lines)
    write_results(given.output, about, results)
    print(json.dumps({"metrics": metrics, "requests": dict(engine.counts)}, indent=2))


def answers_key(model: Model, length: int) -> bytes:
    """What must be the same for an answer to be kept."""
    return orjson.dumps([dict(model.identity), length])


def model_length(model: Model) -> int:
    """Tokens that the model was made for. Raises DataError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.folder).get_text_config()
    except (OSError, ValueError) as error:
        raise DataError(f"{model.folder}: its config cannot be read: {error}") from error
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        raise DataError(f"{model.folder}: its config does not say how long texts may be: give --max-length")
    return int(length)


def engine_length(url: str) -> int:
    """Tokens that a running engine takes at most, of context and continuation. Raises RequestError."""
    models: Any = call(url.rstrip("/"), "GET", "/v1/models", timeout_s=CALL_S)
    return int(models["data"][0]["max_model_len"]) - ENGINE_MARGIN - 1
