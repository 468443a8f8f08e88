"""Look at the judge's prompts, without a server; measure a judge, with one.

python -m megatron_sip.judge list
python -m megatron_sip.judge show quality
python -m megatron_sip.judge show path/to/my_criterion.txt
python -m megatron_sip.judge accuracy judgements/judgements.jsonl --split valid --teacher-url http://host:30000
python -m megatron_sip.judge labels prefixes.jsonl --criteria factuality:v1 factuality:v4 --model HF_DIR
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sip.config.judge_flags import add_accuracy_flags, add_labels_flags, exam_settings
from megatron_sip.console import bars
from megatron_sip.errors import DataError, UserError
from megatron_sip.evaluation import judge_accuracy, judge_labels
from megatron_sip.files import read_json, write_atomically
from megatron_sip.judge.exam import Exam, ExamSettings, Question, Reply
from megatron_sip.judge.prompts import PromptFile, builtin_names, builtin_prompt, find_prompt
from megatron_sip.judge.settings import LIKELIHOOD
from megatron_sip.serving.launch import LocalServer, ServerSettings


def describe(prompt: PromptFile) -> str:
    """The prompt as text, slots in double braces, under a line for each of its settings."""
    lines = [
        f"name: {prompt.name}",
        f"version: {prompt.version}",
        f"kind: {prompt.kind}",
        f"about: {prompt.description}",
    ]
    if prompt.rule is not None:
        values = ", ".join(f"{label} = {value:g}" for label, value in prompt.rule.values.items())
        lines += [f"verdict: {prompt.rule.pattern.pattern}", f"values: {values}", f"soft start: {prompt.start!r}"]
        lines += ["position: anywhere"] if prompt.rule.anywhere else []
    if prompt.text_pattern is not None:
        lines.append(f"text: {prompt.text_pattern.pattern}")
    body = "".join("{{" + piece + "}}" if place % 2 else piece for place, piece in enumerate(prompt.body))
    return "\n".join(lines) + f"\nsource: {prompt.source}\n\n{body}"


def list_prompts() -> str:
    lines = [f"{name:22} {builtin_prompt(name).description}" for name in builtin_names()]
    return "\n".join([*lines, f"{LIKELIHOOD:22} Mean token log-prob under the judge's model; needs no prompt."])


def run_accuracy(given: argparse.Namespace) -> str:
    """Table 8 as Markdown; the figures as JSON where --save says."""
    labelled = judge_accuracy.read_labelled(given.records, given.split)
    earlier = [read_report(Path(name), "a report of `accuracy --save`", judge_accuracy.FIELDS) for name in given.beside]
    make_room(given.save)
    with examined(given) as settings:
        replies, model = ask(settings, [one.question for one in labelled])
    report = judge_accuracy.accuracy(labelled, replies, model, given.seed)
    save(given.save, report)
    return judge_accuracy.markdown([*earlier, report])


def run_labels(given: argparse.Namespace) -> str:
    """Tables 10 to 13 as Markdown; the labels as JSON where --save says."""
    continuations = judge_labels.read_continuations(given.prefixes, given.candidate_field, given.limit)
    questions = judge_labels.questions(continuations, given.criteria)
    earlier = [read_report(Path(name), "a report of `labels --save`", judge_labels.FIELDS) for name in given.beside]
    for name, report in zip(given.beside, earlier, strict=True):
        judge_labels.require_same(continuations, report, name)
    make_room(given.save)
    with examined(given) as settings:
        replies, model = ask(settings, questions)
    report = judge_labels.label_run(continuations, given.criteria, replies, model)
    save(given.save, report)
    return judge_labels.markdown(report, earlier)


@contextlib.contextmanager
def examined(given: argparse.Namespace) -> Iterator[ExamSettings]:
    """How the judge is asked, with a server of --model started for it."""
    if given.model is None:
        yield exam_settings(given)
    else:
        with LocalServer(ServerSettings(given.model)) as server:
            yield exam_settings(given, server.url)


def ask(settings: ExamSettings, questions: Sequence[Question]) -> tuple[list[Reply], str]:
    """(a reply to each question, the model that gave them). Raises the judge's errors."""

    async def asked() -> tuple[list[Reply], str]:
        async with Exam(settings, list(dict.fromkeys(question.criterion for question in questions))) as exam:
            await exam.check()
            with tqdm(total=len(questions), unit="question", desc="judge", file=bars()) as bar:
                return await exam.ask(questions, bar.update), Path(exam.model).name

    return asyncio.run(asked())


def read_report(path: Path, what: str, fields: Sequence[str]) -> dict[str, Any]:
    """What --beside names: looked at before anything is asked. Raises DataError."""
    report = read_json(path, what)
    if not isinstance(report, dict) or not set(fields) <= report.keys():
        raise DataError(f"--beside {path}: it is not {what}, which has {', '.join(fields)}")
    return report


def make_room(path: str | None) -> None:
    """The folder of --save, before anything is asked. Raises OSError."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def save(path: str | None, report: dict[str, Any]) -> None:
    if path is not None:
        write_atomically(Path(path), json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_sip.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the prompts")
    show = commands.add_parser("show", help="a prompt with its verdict pattern")
    show.add_argument("name", help="a name from the list, or the path of a prompt file (*.txt)")
    defaults = argparse.ArgumentDefaultsHelpFormatter
    about = "how often a judge is right about labelled records, by subset and in each order (paper, table 8)"
    add_accuracy_flags(commands.add_parser("accuracy", help=about, description=about, formatter_class=defaults))
    about = "which labels a judge gives by criterion, and how far two runs agree (paper, tables 10 to 13)"
    add_labels_flags(commands.add_parser("labels", help=about, description=about, formatter_class=defaults))
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = command_line().parse_args(arguments)
    run = {
        "list": lambda: list_prompts(),
        "show": lambda: describe(find_prompt(given.name)),
        "accuracy": lambda: run_accuracy(given),
        "labels": lambda: run_labels(given),
    }
    try:
        print(run[given.command]())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
