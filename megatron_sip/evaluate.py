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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sip.errors import UserError
from megatron_sip.evaluation.commands import compare, diversity, generate, nll, rate, sets, table, tasks

PROGRAM = "megatron-sip-evaluate"


@dataclass(frozen=True, slots=True)
class Command:
    """What a module in evaluation/commands/ offers. about: a line of help."""

    about: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


COMMANDS = {
    "generate": Command(generate.ABOUT, generate.add_flags, generate.run),
    "compare": Command(compare.ABOUT, compare.add_flags, compare.run),
    "rate": Command(rate.ABOUT, rate.add_flags, rate.run),
    "nll": Command(nll.ABOUT, nll.add_flags, nll.run),
    "sets": Command(sets.ABOUT, sets.add_flags, sets.run),
    "diversity": Command(diversity.ABOUT, diversity.add_flags, diversity.run),
    "tasks": Command(tasks.ABOUT, tasks.add_flags, tasks.run),
    "table": Command(table.ABOUT, table.add_flags, table.run),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says; a line on stderr and exit status 1 when that cannot be."""
    given = command_line().parse_args(argv)
    try:
        COMMANDS[given.command].run(given)
    except (UserError, OSError, ValueError, RuntimeError) as error:
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
        command.add_flags(commands.add_parser(name, help=command.about, description=command.about))
    return parser


if __name__ == "__main__":
    main()
