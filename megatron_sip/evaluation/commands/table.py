"""The paper's tables, with one's own runs beneath the published numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.evaluation.tables import html, make_tables, markdown, read_run
from megatron_sip.files import write_atomically

ABOUT = "tables as the paper's, with runs beneath its numbers"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Runs, tables, output."""
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]FOLDER", help="a folder of results, and what its row is called"
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        metavar="N",
        help="1 to 6 or 14; default: those that a run adds to, and what they do not show",
    )
    parser.add_argument("--output", type=Path, help="a .md or .html file; default: Markdown on the screen")


def run(given: argparse.Namespace) -> None:
    """Write the tables, or print them."""
    if given.output is not None and given.output.suffix not in (".md", ".html"):
        raise DataError(f"--output {given.output}: its name must end in .md or .html")
    runs = {}
    for word in given.runs:
        name, _, folder = word.rpartition("=")
        path = Path(folder)
        name = name or path.resolve().name
        if name in runs:
            raise DataError(f"{word}: another run is called {name!r} already; give this one a name: NAME={folder}")
        runs[name] = read_run(path)
    tables = make_tables(runs, given.tables)
    if given.tables is None:
        tables = [table for table in tables if any(not row.published for row in table.rows)]
    if given.output is None:
        print(markdown(tables), end="")
    else:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(given.output, html(tables) if given.output.suffix == ".html" else markdown(tables))
