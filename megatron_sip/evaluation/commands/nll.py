"""How likely a model finds held-out text: suffixes given their prefixes, and whole documents."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_sip.config.settings import task_settings
from megatron_sip.config.unused_flags import refuse_unused
from megatron_sip.console import bars
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.errors import DataError
from megatron_sip.evaluation.commands.generate import BATCHES_IN_FLIGHT, add_task_flags, check_samples, open_split
from megatron_sip.evaluation.growing_file import alone
from megatron_sip.evaluation.nll import Measured, measure, nll_result
from megatron_sip.evaluation.results import write_results
from megatron_sip.evaluation.served_model import Model, add_model_flags, engines_of, open_model, pool_settings
from megatron_sip.rollout.pool import PoolSettings, SGLangPool

ABOUT = "negative log-likelihood and perplexity of held-out suffixes and whole documents"
SUFFIX, DOCUMENT = "suffix", "document"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Model and tasks."""
    add_model_flags(parser)
    parser.add_argument("--output", type=Path, required=True, help="file of results; what is measured grows beside it")
    parser.add_argument(
        "--of",
        nargs="+",
        choices=(SUFFIX, DOCUMENT),
        default=[SUFFIX, DOCUMENT],
        help="suffixes given their prefixes, as generate cuts them; documents in pieces of --seq-length, each behind a token",
    )
    add_task_flags(parser, parser)


def run(given: argparse.Namespace) -> None:
    """Serve the model if need be, measure, write results."""
    check_samples(given)
    if SUFFIX not in given.of:
        refuse_unused(
            given, add_flags, ("--suffix-length", "--min-prefix-length", "--task-mode"), f"with --of {DOCUMENT}"
        )
    make = {SUFFIX: lambda: task_settings(given), DOCUMENT: lambda: TaskSettings.whole(given.seq_length, given.seed)}
    settings = {of: make[of]() for of in given.of}
    model = open_model(given)
    corpus = open_split(given, model.tokenizer)
    sources = {of: TaskSource(corpus, model.tokenizer, how) for of, how in settings.items()}
    with alone(given.output), engines_of(model, given, given.output, given.seq_length) as urls:
        pool = pool_settings(given, corpus.vocab_size)
        found = {of: asyncio.run(measured(given, model, of, tasks, urls, pool)) for of, tasks in sources.items()}
    results = [nll_result(lines, of, given.seed) for of, lines in found.items()]
    tokens = {f"{of} tokens": sum(line.tokens for line in lines) for of, lines in found.items()}
    for result in results:
        low, high = result.interval or (math.nan, math.nan)
        print(
            f"nll/{result.dataset}: {result.value:.4f} nats a token (95% {low:.4f} to {high:.4f}), perplexity "
            f"{math.exp(result.value):.3f}, {tokens[f'{result.dataset} tokens']} tokens of {result.samples} tasks"
        )
    cuts = {"seq_length": given.seq_length, "suffix_length": given.suffix_length}
    write_results(
        given.output, {**model.header(), "data": given.data_path, "part": given.part, **cuts, **tokens}, results
    )


async def measured(
    given: argparse.Namespace, model: Model, of: str, tasks: TaskSource, urls: Sequence[str], pool: PoolSettings
) -> list[Measured]:
    """The lines of one kind; of documents no more than there are in an epoch."""
    samples = given.samples if of == SUFFIX else min(given.samples, sum(tasks.tasks_per_epoch))
    if not samples:
        raise DataError(f"--part {given.part}: no document")
    path = given.output.with_name(f"{given.output.name}.{of}.jsonl")
    header = {**model.header(), "tasks": tasks.fingerprint()}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=samples, desc=of, unit="task", file=bars()))
        async with SGLangPool(urls, pool) as engines:
            await engines.wait_ready()
            batch = BATCHES_IN_FLIGHT * given.concurrency * len(urls)
            return await measure(path, header, engines, tasks, samples, batch=batch, progress=bar.update)
