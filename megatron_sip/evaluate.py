"""Numbers about a model: continuations of held-out prefixes, compared by a judge.

    megatron-sip-evaluate generate --model HF_DIR --data-path 'text/*.jsonl' --samples 1000 --output base.jsonl
    megatron-sip-evaluate generate --model RUN_DIR/checkpoints --data-path 'text/*.jsonl' --samples 1000 --output trained.jsonl
    megatron-sip-evaluate compare base.jsonl trained.jsonl --criteria quality --teacher-url http://host:30000
    megatron-sip-evaluate diversity trained.jsonl

generate can be repeated after a kill and goes on where it was; compare asks nothing again that --judge-cache has kept.
`COMMAND --help` lists the flags.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sip.checkpoints.folder import TRACKER
from megatron_sip.config.flags import JUDGE_FLAGS, add_flags, add_teacher_flags
from megatron_sip.config.needs import has_served_criteria
from megatron_sip.config.settings import task_settings
from megatron_sip.config.teacher_settings import judge_settings
from megatron_sip.console import bars
from megatron_sip.data.documents import SPLITS, open_corpus
from megatron_sip.data.tasks import TaskSource
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.errors import DataError, UserError
from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.generation import ENDED, Generations, generate, read_generations
from megatron_sip.evaluation.win_rate import WinRate, compare
from megatron_sip.files import move_into_place, write_atomically
from megatron_sip.hf.folder import HF_SUBFOLDER
from megatron_sip.judge import Judge
from megatron_sip.judge.settings import LABELLED_CRITERIA, JudgeSettings, parse_criteria
from megatron_sip.rollout.pool import PoolSettings, SGLangPool
from megatron_sip.rollout.sampling import SamplingSettings
from megatron_sip.serving.guard import own_environment
from megatron_sip.serving.launch import LocalServer, ServerSettings
from megatron_sip.serving.local_servers import ENGINE_MARGIN

PROGRAM = "megatron-sip-evaluate"
JUDGEMENTS, TEMPERATURE = 8, 0.7
"""Of the paper's comparisons (section 3.3): eight a pair, four in each order, and their mean."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says; a line on stderr and exit status 1 when that cannot be."""
    given = command_line().parse_args(argv)
    try:
        {"generate": run_generate, "compare": run_compare, "diversity": run_diversity}[given.command](given)
    except (UserError, OSError, ValueError, RuntimeError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _generate_flags(commands.add_parser("generate", help="continue held-out prefixes"))
    _compare_flags(commands.add_parser("compare", help="judge one model's continuations against another's"))
    varied = commands.add_parser("diversity", help="distinct n-grams, repetition and length of continuations")
    varied.add_argument("generations", nargs="+", type=Path, help="files that generate wrote")
    return parser


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="an HF folder, or a checkpoint folder of a run; served on this node")
    model.add_argument("--url", nargs="+", help="running SGLang engines that serve the model; needs --tokenizer")
    parser.add_argument("--tokenizer", help="HF folder of the model's tokenizer, with --url")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; continued when it is there")
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
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling")
    parser.add_argument("--dtype", default="auto", help="number format of a served --model")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one call")
    parser.add_argument("--concurrency", type=int, default=64, help="calls in flight for each engine")


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, help="generations of the model that is compared with")
    parser.add_argument("model", type=Path, help="generations of the model in question, of the same tasks")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws and of the interval's resampling")
    add_teacher_flags(parser.add_argument_group("the judge's servers, as the trainer takes them"))
    add_flags(parser.add_argument_group("the judge, as the trainer takes it"), JUDGE_FLAGS)
    parser.set_defaults(
        criteria=["quality=1"], judge_verdict=["hard"], judge_votes=JUDGEMENTS, judge_temperature=TEMPERATURE
    )
    parser.set_defaults(tasks="documents", teacher_model=None, judge_audit_rate=0.0, judge_deadline=24 * 3600.0)


def run_generate(given: argparse.Namespace) -> None:
    """`generate`: serve the model if need be, open its tasks, continue them."""
    if given.url and not given.tokenizer:
        raise DataError("--url needs --tokenizer, the HF folder of the model that the engines serve")
    if given.samples < 1:
        raise DataError(f"--samples {given.samples}: at least 1 is needed")
    settings = task_settings(given)
    sampling = SamplingSettings(given.suffix_length, given.temperature, given.top_p)
    with contextlib.ExitStack() as stack:
        folder = None if given.model is None else hf_folder(given.model, given.output)
        tokenizer = load_tokenizer(given.tokenizer or str(folder))
        how = TokenizeSettings(text_field=given.text_field, prepend_bos=given.prepend_bos)
        corpus = open_corpus(given.data_path, tokenizer, how).split(given.split)[given.subset]
        tasks = TaskSource(corpus, tokenizer, settings)
        header = {"model": str(given.model or given.url[0]), "subset": given.subset, "tasks": tasks.fingerprint()}
        if folder is not None and folder != given.model:
            header["step"] = folder.name.rpartition("_")[2]
        urls = given.url
        if folder is not None:
            context = given.seq_length + ENGINE_MARGIN
            log = given.output.with_name(given.output.name + ".server.log")
            served = ServerSettings(folder, given.dtype, context_length=context, seed=given.seed, log_file=log)
            urls = [stack.enter_context(LocalServer(served)).url]
        pool = PoolSettings(
            call_timeout_s=given.timeout,
            deadline_s=3 * given.timeout,
            max_concurrency=given.concurrency,
            vocab_size=corpus.vocab_size,
        )
        bar = stack.enter_context(tqdm(total=given.samples, desc="prefixes", unit="prefix", file=bars()))

        async def work() -> Generations:
            async with SGLangPool(urls, pool) as engines:
                await engines.wait_ready()
                return await generate(
                    given.output, header, engines, tasks, tokenizer, sampling, given.samples, progress=bar.update
                )

        made = asyncio.run(work())
    print(json.dumps({"generations": len(made.lines), **diversity([line.text for line in made.lines])}, indent=2))


def run_compare(given: argparse.Namespace) -> None:
    """`compare`: the share of the judgements that prefer the second model, with its interval by document."""
    for name in parse_criteria(given.criteria):
        if name in LABELLED_CRITERIA:
            raise DataError(
                f"--criteria {name}: it scores answers to --tasks {LABELLED_CRITERIA[name]}, not continuations"
            )
    if has_served_criteria(given) and not given.teacher_url:
        raise DataError("compare needs --teacher-url, the judge's servers")
    result = asyncio.run(compared(judge_settings(given), given.base, given.model, given.seed))
    text = json.dumps({"base": str(given.base), "model": str(given.model), **asdict(result)}, indent=2)
    if given.output is not None:
        write_atomically(given.output, text + "\n")
    print(text)


async def compared(settings: JudgeSettings, base: Path, model: Path, seed: int) -> WinRate:
    """Judge the continuations in `model` against those in `base`.

    Raises:
        DataError: they are not of the same tasks.
    """
    before, after = read_generations(base), read_generations(model)
    require_same_tasks(base, before, model, after)
    async with Judge(settings, document_end=ENDED) as judge:
        await judge.check()
        tasks, documents = [line.task for line in after.lines], [line.document for line in after.lines]
        found, _ = await compare(
            judge,
            tasks,
            documents,
            [line.candidate for line in before.lines],
            [line.candidate for line in after.lines],
            seed,
        )
        return found


def require_same_tasks(base: Path, before: Generations, model: Path, after: Generations) -> None:
    """Raises DataError unless both files hold the same prefixes in the same order, and at least one."""
    if len(before.lines) != len(after.lines) or not after.lines:
        raise DataError(
            f"{base} holds {len(before.lines)} generations, {model} {len(after.lines)}: finish both with the same --samples"
        )
    for one, other in zip(before.lines, after.lines, strict=True):
        if (one.prefix, one.suffix) != (other.prefix, other.suffix):
            raise DataError(
                f"{base} and {model}: task {one.index} has another prefix in each; generate both with the same --data-path, "
                "--split, --subset, --seed and lengths"
            )


def run_diversity(given: argparse.Namespace) -> None:
    """`diversity`: a table, a line for each file."""
    found = {str(path): diversity([line.text for line in read_generations(path).lines]) for path in given.generations}
    print(json.dumps(found, indent=2))


def load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def hf_folder(model: Path, output: Path) -> Path:
    """`model` itself where it is an HF folder; of a run's latest checkpoint an HF export beside `output`, made once.

    Raises:
        DataError: neither of the two, or the checkpoint cannot be converted.
    """
    if not (model / TRACKER).is_file():
        if (model / "config.json").is_file():
            return model
        raise DataError(
            f"--model {model}: neither an HF folder (config.json) nor a checkpoint folder ({TRACKER}); a run's checkpoints lie "
            f"in its --save folder, its exported model in {HF_SUBFOLDER}/"
        )
    step = (model / TRACKER).read_text().strip()
    exported = output.with_name(f"{output.name}.hf_{step}")
    if exported.exists():
        return exported
    staged = exported.with_name(f".{exported.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    staged.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_sip.hf.convert", "megatron-to-hf", "--load", str(model)]
    done = subprocess.run(
        [*command, "--save", str(staged)], env=own_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(f"--model {model}: {(done.stderr or done.stdout).strip()[-2000:]}")
    if (model / TRACKER).read_text().strip() != step:
        raise DataError(
            f"--model {model}: its run saved another step meanwhile: give the command again when it has ended"
        )
    move_into_place(staged, exported)
    return exported


if __name__ == "__main__":
    main()
