"""Numbers about a model: continuations of prefixes and public prompts, judged; likelihoods; tables (docs/evaluation.md).

    megatron-sip-evaluate generate --model HF_DIR --data-path 'text/*.jsonl' --samples 1000 --output base.jsonl
    megatron-sip-evaluate generate --model RUN_DIR/checkpoints --data-path 'text/*.jsonl' --samples 1000 --output trained.jsonl
    megatron-sip-evaluate compare base.jsonl trained.jsonl --criteria quality --teacher-url http://host:30000
    megatron-sip-evaluate generate --model HF_DIR --set xstest-safe=xstest_prompts.csv --output xstest.jsonl
    megatron-sip-evaluate rate xstest.jsonl --criteria safety --teacher-url http://host:30000
    megatron-sip-evaluate nll --model HF_DIR --data-path 'text/*.jsonl' --samples 1000 --output results/nll.json
    megatron-sip-evaluate diversity trained.jsonl
    megatron-sip-evaluate tasks --model HF_DIR --tasks standard --output results/trained/standard.json
    megatron-sip-evaluate table base=results/base trained=results/trained

generate, nll, tasks can be repeated after a kill and go on where they were; compare and rate with --output ask nothing again.
`COMMAND --help` lists the flags.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Protocol

from megatron_sip.errors import UserError
from megatron_sip.evaluation.commands import compare, diversity, generate, nll, rate, sets, table, tasks

PROGRAM = "megatron-sip-evaluate"


class Command(Protocol):
    """What a module in evaluation/commands/ offers. ABOUT: a line of help."""

    ABOUT: str

    def add_flags(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, given: argparse.Namespace, /) -> None: ...


COMMANDS: dict[str, Command] = {
    "generate": generate,
    "compare": compare,
    "rate": rate,
    "nll": nll,
    "sets": sets,
    "diversity": diversity,
    "tasks": tasks,
    "table": table,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says; a line on stderr and exit status 1 when that cannot be."""
    given = command_line().parse_args(argv)
    try:
        COMMANDS[given.command].run(given)
    except (UserError, OSError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_flags(commands.add_parser(name, help=command.ABOUT, description=command.ABOUT))
    return parser


if __name__ == "__main__":
    main()
