"""Continue held-out prefixes by a model, into a file that comparisons read."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from pathlib import Path

from tqdm import tqdm

from megatron_sip.config.settings import task_settings
from megatron_sip.console import bars
from megatron_sip.data.documents import SPLITS, open_corpus
from megatron_sip.data.tasks import TaskSource
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.errors import DataError
from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.generation import Generations, generate
from megatron_sip.evaluation.served_model import add_model_flags, engines_of, open_model, pool_settings
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings

ABOUT = "continue held-out prefixes"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Model, tasks, sampling."""
    add_model_flags(parser)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; continued when it is there")
    add_task_flags(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling")


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Which documents are cut, and how."""
    parser.add_argument("--data-path", nargs="+", required=True, help="sources, as the trainer takes them")
    parser.add_argument("--text-field", default="text", help="field of jsonl and parquet records that holds the text")
    parser.add_argument("--prepend-bos", choices=("auto", "on", "off"), default="auto", help="as the trainer's")
    parser.add_argument("--split", default="969,30,1", help="shares of train, valid and test, as the trainer was told")
    parser.add_argument("--subset", choices=SPLITS, default="test", help="whose documents are cut")
    parser.add_argument("--samples", type=int, required=True, help="number of prefixes")
    parser.add_argument("--seq-length", type=int, default=2048, help="most tokens of a prefix and its suffix together")
    parser.add_argument("--suffix-length", type=int, default=128, help="tokens of a continuation")
    parser.add_argument("--min-prefix-length", type=int, default=16, help="shortest prefix")
    parser.add_argument("--task-mode", choices=("random", "stream"), default="random", help="as the trainer's")
    parser.add_argument("--seed", type=int, default=1234, help="of the cuts, and of a served model's sampling")


def run(given: argparse.Namespace) -> None:
    """Serve the model if need be, open its tasks, continue them."""
    if given.samples < 1:
        raise DataError(f"--samples {given.samples}: at least 1 is needed")
    settings = task_settings(given)
    sampling = SamplingSettings(given.suffix_length, given.temperature, given.top_p)
    model = open_model(given, given.output)
    how = TokenizeSettings(text_field=given.text_field, prepend_bos=given.prepend_bos)
    corpus = open_corpus(given.data_path, model.tokenizer, how).split(given.split)[given.subset]
    tasks = TaskSource(corpus, model.tokenizer, settings)
    header = {**model.header(), "subset": given.subset, "tasks": tasks.fingerprint()}
    pool = pool_settings(given, corpus.vocab_size)
    with contextlib.ExitStack() as stack:
        urls = stack.enter_context(engines_of(model, given, given.output, given.seq_length))
        bar = stack.enter_context(tqdm(total=given.samples, desc="prefixes", unit="prefix", file=bars()))

        async def work() -> Generations:
            async with SGLangPool(urls, pool) as engines:
                await engines.wait_ready()
                return await generate(
                    given.output, header, engines, tasks, model.tokenizer, sampling, given.samples, progress=bar.update
                )

        made = asyncio.run(work())
    print(json.dumps({"generations": len(made.lines), **diversity([line.text for line in made.lines])}, indent=2))
