"""Continue held-out prefixes, or the prompts of a public set, by a model, into a file that comparisons read."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sip.config.settings import task_settings, tokenize_settings
from megatron_sip.config.unused_flags import refuse_unused
from megatron_sip.console import bars
from megatron_sip.data.documents import DEFAULT_SPLIT, Corpus, open_splits
from megatron_sip.data.roles import ROLES, SPLITS
from megatron_sip.data.tasks import TaskSource
from megatron_sip.errors import DataError
from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.generation import DrawsTasks, Generations, Repeated, generate
from megatron_sip.evaluation.growing_file import alone
from megatron_sip.evaluation.served_model import add_model_flags, engines_of, open_model, pool_settings
from megatron_sip.evaluation.suites.prompt_tasks import set_tasks
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings

ABOUT = "continue held-out prefixes, or prompts of a public set"
OF_DOCUMENTS = (
    *("--text-field", "--data-cache-path", "--split", "--subset", "--part"),
    *("--min-prefix-length", "--task-mode"),
)
BATCHES_IN_FLIGHT = 4
"""Tasks of a batch, which is written when it is done, for each call in flight: few engines wait for a batch's last ones."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Model, tasks, sampling."""
    add_model_flags(parser)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; continued when it is there")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--set", metavar="NAME=FILE", help="a set of prompts: `megatron-sip-evaluate sets` lists them")
    add_task_flags(parser, source)
    parser.add_argument("--wikipedia", type=Path, help="database of pages that --set factscore needs beside its FILE")
    parser.add_argument("--dataset", help="what results call these tasks; default: the set's NAME, or documents")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling")
    parser.add_argument("--num-rollouts", type=int, default=1, help="sampled continuations of each prefix")


def add_task_flags(parser: argparse.ArgumentParser, source: Any) -> None:
    """Which documents are cut, and how; --data-path stands in `source`."""
    source.add_argument("--data-path", nargs="+", required=source is parser, help="sources, as the trainer takes them")
    parser.add_argument("--text-field", default="text", help="field of jsonl and parquet records that holds the text")
    parser.add_argument("--prepend-bos", choices=("auto", "on", "off"), default="auto", help="as the trainer's")
    parser.add_argument("--data-cache-path", help="folder in which tokens of text are kept, as the trainer's")
    parser.add_argument("--split", help=f"shares of train, valid and test, as the trainer was told; {DEFAULT_SPLIT}")
    parser.add_argument(
        "--subset", choices=ROLES, help="of corpora with roles and splits of their own, as the trainer's"
    )
    parser.add_argument("--part", choices=SPLITS, default="test", help="split whose documents are cut")
    parser.add_argument("--samples", "--limit", type=int, help="number of tasks; of a --set all unless given")
    parser.add_argument("--seq-length", type=int, default=2048, help="most tokens of a prefix and its suffix together")
    parser.add_argument("--suffix-length", type=int, default=128, help="tokens of a continuation")
    parser.add_argument("--min-prefix-length", type=int, default=16, help="shortest prefix of a document")
    parser.add_argument("--task-mode", choices=("random", "stream"), default="random", help="as the trainer's")
    parser.add_argument("--seed", type=int, default=1234, help="of the cuts, of a set's order, of a model's sampling")


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tasks that are asked for. header: what the file of generations says of them."""

    tasks: DrawsTasks
    samples: int
    vocab_size: int
    header: dict[str, str]

    def repeated(self, times: int) -> Drawn:
        """Each task `times` times; the file then says so, since its order depends on how many there are."""
        if times == 1:
            return self
        header = self.header | {"repeated": f"{self.samples} prefixes, {times} times each"}
        return replace(self, tasks=Repeated(self.tasks, self.samples), samples=times * self.samples, header=header)


def run(given: argparse.Namespace) -> None:
    """Serve the model if need be, open its tasks, continue them."""
    sampling = SamplingSettings(given.suffix_length, given.temperature, given.top_p)
    check_flags(given)
    model = open_model(given)
    drawn = tasks_of_set(given, model.tokenizer) if given.set else document_tasks(given, model.tokenizer)
    drawn = drawn.repeated(given.num_rollouts)
    pool = pool_settings(given, drawn.vocab_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(given.output))
        urls = stack.enter_context(engines_of(model, given, given.output, given.seq_length))
        bar = stack.enter_context(tqdm(total=drawn.samples, desc="prefixes", unit="prefix", file=bars()))

        async def work() -> Generations:
            header = {**model.header(), **drawn.header}
            async with SGLangPool(urls, pool) as engines:
                await engines.wait_ready()
                return await generate(
                    given.output,
                    header,
                    engines,
                    drawn.tasks,
                    model.tokenizer,
                    sampling,
                    drawn.samples,
                    batch=BATCHES_IN_FLIGHT * given.concurrency * len(urls),
                    progress=bar.update,
                )

        made = asyncio.run(work())
    print(json.dumps({"generations": len(made.lines), **diversity([line.text for line in made.lines])}, indent=2))


def check_flags(given: argparse.Namespace) -> None:
    """Raises DataError for impossible lengths and samples, and for flags that do nothing beside the others."""
    check_samples(given)
    if given.num_rollouts < 1:
        raise DataError(f"--num-rollouts {given.num_rollouts}: at least 1 is needed")
    if given.temperature == 0:
        refuse_unused(given, add_flags, ("--top-p", "--num-rollouts"), "with --temperature 0, which is greedy")
    if not given.set:
        task_settings(given)
        refuse_unused(given, add_flags, ("--wikipedia",), "with --data-path")
        return
    refuse_unused(given, add_flags, OF_DOCUMENTS, "with --set")
    name, _ = set_of(given)
    if name != "factscore":
        refuse_unused(given, add_flags, ("--wikipedia",), f"with --set {name}")


def check_samples(given: argparse.Namespace) -> None:
    """Raises DataError unless --samples is a number of tasks, or is left out beside --set."""
    if given.samples is None and given.data_path:
        raise DataError("--samples: how many prefixes of --data-path?")
    if given.samples is not None and given.samples < 1:
        raise DataError(f"--samples {given.samples}: at least 1 is needed")


def open_split(given: argparse.Namespace, tokenizer: Any) -> Corpus:
    """The documents that the flags name. Raises DataError."""
    splits = open_splits([given.part], given.data_path, given.split, given.subset, tokenizer, tokenize_settings(given))
    return splits[given.part]


def document_tasks(given: argparse.Namespace, tokenizer: Any) -> Drawn:
    """Prefixes of held-out documents."""
    corpus = open_split(given, tokenizer)
    tasks = TaskSource(corpus, tokenizer, task_settings(given))
    header = {"dataset": given.dataset or "documents", "part": given.part, "tasks": tasks.fingerprint()}
    return Drawn(tasks, given.samples, corpus.vocab_size, header)


def tasks_of_set(given: argparse.Namespace, tokenizer: Any) -> Drawn:
    """Prompts of a public set. Raises DataError."""
    name, file = set_of(given)
    tasks = set_tasks(
        name,
        file,
        tokenizer,
        samples=given.samples,
        room=given.seq_length - given.suffix_length,
        prepend_bos=given.prepend_bos,
        seed=given.seed,
        wikipedia=given.wikipedia,
    )
    told = f"{tasks.samples} of the {tasks.prompts} prompts in {file}"
    if tasks.cut:
        told += f"; the model sees only the end of {tasks.cut}, which are longer than {tasks.room} tokens: raise --seq-length"
    print(told)
    header = {"dataset": given.dataset or name, "tasks": tasks.fingerprint()}
    return Drawn(tasks, tasks.samples, tasks.vocab_size, header)


def set_of(given: argparse.Namespace) -> tuple[str, Path]:
    """Name and file of --set. Raises DataError."""
    name, _, file = given.set.partition("=")
    if not file:
        raise DataError(f"--set {given.set}: write NAME=FILE; `megatron-sip-evaluate sets` lists the names")
    return name, Path(file)
