"""Rewrite a corpus' suffixes ahead of training, into the cache that training reads.

    python tools/rewrite_corpus.py --data-path 'data/*.jsonl' --tokenizer POLICY_DIR --teacher-url http://host:30000 \\
        --teacher-tokenizer TEACHER_DIR --cache rewrites/ --samples 100000

Tasks are drawn as the trainer draws them: give the same --seed, --split, --seq-length, --suffix-length,
--min-prefix-length, --task-mode, --prepend-bos, --judge-prefix-chars and --rewrite-temperature, and pass the cache as
--judge-cache to the training run, whose rewriter then asks nobody. Stop and repeat the command at will: what is in the
cache is not asked again. Ends with the counts as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_sip.config.flags import REWRITE_FLAGS, add_flags, add_teacher_flags
from megatron_sip.config.settings import tokenize_settings
from megatron_sip.config.teacher_settings import rewriter_settings
from megatron_sip.data.documents import DEFAULT_SPLIT, open_splits
from megatron_sip.data.roles import ROLES
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.errors import UserError
from megatron_sip.judge import Rewriter

BATCH_SECONDS = 24 * 3600.0
"""A batch waits that long for servers that are down."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", nargs="+", required=True, help="sources, as the trainer takes them")
    parser.add_argument("--text-field", default="text", help="JSON field or parquet column of the text")
    parser.add_argument(
        "--prepend-bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="begin documents with BOS, as the trainer does",
    )
    parser.add_argument("--data-cache-path", help="folder in which tokens of text are kept, as the trainer's")
    parser.add_argument("--split", help=f"train,valid,test shares; the train part is rewritten; {DEFAULT_SPLIT}")
    parser.add_argument(
        "--subset", choices=ROLES, help="of corpora with roles and splits of their own, as the trainer's"
    )
    parser.add_argument("--tokenizer", required=True, help="the policy's Hugging Face tokenizer")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--suffix-length", type=int, default=128)
    parser.add_argument("--min-prefix-length", type=int, default=16)
    parser.add_argument("--task-mode", choices=("random", "stream"), default="random")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--start", type=int, default=0, help="index of the first task")
    parser.add_argument("--samples", type=int, required=True, help="number of tasks")
    parser.add_argument("--batch", type=int, default=1024, help="tasks between two commits to the cache")
    parser.add_argument("--concurrency", dest="judge_concurrency", type=int, default=256, help="requests in flight")
    parser.add_argument(
        "--cache", dest="judge_cache", type=Path, required=True, help="folder or sqlite file that keeps the rewrites"
    )
    group = parser.add_argument_group("the rewriter's servers, as the trainer takes them")
    add_teacher_flags(group)
    add_flags(group, REWRITE_FLAGS)
    parser.set_defaults(teacher_model=None, judge_deadline=BATCH_SECONDS)
    args = parser.parse_args(arguments)
    if not args.teacher_url:
        parser.error("--teacher-url is required: the servers of the rewriter")
    return args


async def rewrite_corpus(args: argparse.Namespace) -> dict[str, float]:
    """Rewrite tasks start .. start + samples; the rewriter's counts. Raises DataError and the judge's errors."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    corpus = open_splits(["train"], args.data_path, args.split, args.subset, tokenizer, tokenize_settings(args))[
        "train"
    ]
    settings = TaskSettings(args.seq_length, args.suffix_length, args.task_mode, args.seed, args.min_prefix_length)
    tasks = TaskSource(corpus, tokenizer, settings)
    async with Rewriter(rewriter_settings(args), tokenizer, args.suffix_length) as rewriter:
        await rewriter.check()
        with tqdm(total=args.samples, unit="task", desc="rewrites") as bar:
            for begin in range(args.start, args.start + args.samples, args.batch):
                count = min(args.batch, args.start + args.samples - begin)
                await rewriter.rewrite(tasks.tasks(begin, count))
                bar.update(count)
        return rewriter.counters()


def main(arguments: list[str] | None = None) -> None:
    try:
        counts = asyncio.run(rewrite_corpus(parse_arguments(arguments)))
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(counts, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
