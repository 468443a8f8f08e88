"""Make a corpus of raw shards, and records to train on of its documents.

python -m megatron_sip.prepare redpajama --keep unsafe --data-path 'rp/documents/**/*.json.gz' --out corpus/
python -m megatron_sip.prepare dedup --data-path corpus/ --out unique/
python -m megatron_sip.prepare roles --data-path unique/ --out roles/
python -m megatron_sip.prepare judgements --task quality --data-path roles/ --tokenizer HF_DIR \\
    --corrupt shuffle numbers --out judgements/
python -m megatron_sip.prepare judgements --task safety ... --teacher-url http://host:30000 --out safety/
python -m megatron_sip.prepare judgements --task quality --from-groups runs/policy/groups --out refreshed/
python -m megatron_sip.prepare rewrites ... --no-cut --label-field toxic --safe-labels no --unsafe-labels yes --out rewrites/
python -m megatron_sip.prepare thoughts ... --teacher-url http://host:30000 --out thoughts/
python -m megatron_sip.prepare prefixes --keep unsafe --samples 1000 --data-path roles/ ... --teacher-url ... --out unsafe/

Stop and repeat a command at will: it goes on where it was. manifest.json says what went in and what was dropped, and why.
COMMAND --help explains each flag.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sip.config.corpus_flags import CORPORA, add_corpus_flags, corpus_command
from megatron_sip.config.corpus_folder_flags import add_dedup_flags, add_roles_flags, dedup_work, roles_work
from megatron_sip.config.prefixes_flags import add_prefixes_flags, prefixes_work
from megatron_sip.config.prepare_flags import (
    add_judgements_flags,
    add_rewrites_flags,
    judgements_work,
    rewrites_work,
)
from megatron_sip.config.thoughts_flags import add_thoughts_flags, thoughts_work
from megatron_sip.corpus.dedup import dedup
from megatron_sip.corpus.roles import divide
from megatron_sip.errors import UserError
from megatron_sip.prepare.commands import (
    GroupWork,
    LabelWork,
    QualityWork,
    prepare_groups,
    prepare_labels,
    prepare_quality,
)
from megatron_sip.prepare.prefixes import prepare_prefixes
from megatron_sip.prepare.thoughts import prepare_thoughts


@dataclass(frozen=True, slots=True)
class Command:
    """about: a line of help. add_flags: to its parser. run: what its namespace says, down to the manifest."""

    about: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Mapping[str, Any]]


def run_judgements(given: argparse.Namespace) -> dict[str, Any]:
    match judgements_work(given):
        case QualityWork() as quality:
            return asyncio.run(prepare_quality(quality))
        case LabelWork() as labels:
            return asyncio.run(prepare_labels(labels))
        case GroupWork() as groups:
            return asyncio.run(prepare_groups(groups))


def run_rewrites(given: argparse.Namespace) -> dict[str, Any]:
    return asyncio.run(prepare_labels(rewrites_work(given)))


def run_thoughts(given: argparse.Namespace) -> dict[str, Any]:
    return asyncio.run(prepare_thoughts(thoughts_work(given)))


def run_prefixes(given: argparse.Namespace) -> dict[str, Any]:
    return asyncio.run(prepare_prefixes(prefixes_work(given)))


def run_dedup(given: argparse.Namespace) -> dict[str, Any]:
    return dedup(dedup_work(given))


def run_roles(given: argparse.Namespace) -> dict[str, Any]:
    return divide(roles_work(given))


COMMANDS = {
    **{name: Command(corpus.about, add_corpus_flags(name), corpus_command(name)) for name, corpus in CORPORA.items()},
    "dedup": Command("a corpus without the documents that repeat an earlier one", add_dedup_flags, run_dedup),
    "roles": Command("a corpus whose every document is for one role and one split", add_roles_flags, run_roles),
    "judgements": Command("what a judge learns from: prompts and right verdicts", add_judgements_flags, run_judgements),
    "rewrites": Command("what a rewriter learns from: suffixes, safe or not", add_rewrites_flags, run_rewrites),
    "thoughts": Command(
        "documents with a teacher's thoughts, and places for a policy's own", add_thoughts_flags, run_thoughts
    ),
    "prefixes": Command(
        "evaluation's tasks: prefixes that all votes call unsafe, or safe", add_prefixes_flags, run_prefixes
    ),
}


SHOWN = ("documents", "dropped", "broken_shards", "broken", "records")
"""Of a manifest, on the screen."""


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="megatron-sip-prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.about,
            description=command.about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        command.add_flags(own)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake of the user's ends it with one line."""
    given = command_line().parse_args(arguments)
    try:
        manifest = COMMANDS[given.command].run(given)
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    print(json.dumps({name: manifest[name] for name in SHOWN if name in manifest}, indent=1))


if __name__ == "__main__":
    main()
