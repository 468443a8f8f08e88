"""The paper's tables 1 to 6 and 14 with rows of one's own beneath its numbers, and tables of what these do not show.

A column is a `measure/dataset` of results, or a measure alone: the average over its datasets, as the paper weights them. All
is in per cent but log-likelihoods, which are in nats a token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_sip.errors import DataError
from megatron_sip.evaluation.results import FORMAT, Result, read_results
from megatron_sip.files import read_json

WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "safety": {
        "realtoxicityprompts": 1000,
        "redpajama": 1000,
        "toxigen": 940,
        "xstest-safe": 250,
        "xstest-unsafe": 200,
    },
    "factuality": {
        "slimpajama": 1000,
        "factscore": 500,
        "halueval-dialogue": 1000,
        "halueval-qa": 1000,
        "halueval-summarization": 1000,
        "truthfulqa-mc1": 817,
        "truthfulqa-mc2": 817,
    },
    "standard": dict.fromkeys(
        ("boolq", "piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "social_iqa", "mmlu"), 1
    ),
}
"""Of the averages: by samples (section 3.3; these numbers reproduce the published averages), standard tasks alike."""

HEADINGS = {"quality": "Generation quality", "coherence": "Coherence", "safety": "Safety", "factuality": "Factuality"}
HEADINGS |= {"standard": "Standard tasks"}
DATASETS = {"standard": "standard prefixes", "unsafe": "unsafe prefixes"}
NATS = "nll"
"""The measure that is no share."""

ABOUT_A_RUN = ("model", "step")
"""What must be the same in all files of a row."""

Values = Mapping[str, Result]
"""A run's results by `measure/dataset`."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a value and its 95% interval for each column, None for a number that is not there."""

    model: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None]
    published: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows under a title, and notes below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()


def average(measure: str, values: Values) -> float | None:
    """The measure's weighted mean over WEIGHTS' datasets; None unless all of them are there."""
    weights = WEIGHTS[measure]
    found = {name: values.get(f"{measure}/{name}") for name in weights}
    present = {name: result.value for name, result in found.items() if result is not None}
    if len(present) < len(weights):
        return None
    return math.fsum(weights[name] * value for name, value in present.items()) / sum(weights.values())


def read_run(folder: Path) -> dict[str, Result]:
    """All results in the JSON files of `folder`; other files there are passed over.

    Raises:
        DataError: no results are there, two of the same measure and dataset, or some of another model or step.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no folder; name one with the files that megatron-sip-evaluate wrote by --output")
    values: dict[str, Result] = {}
    came_from: dict[str, Path] = {}
    about: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, "a file of results")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            continue
        found = read_results(path)
        for what in ABOUT_A_RUN:
            own = str(found.about.get(what, "none"))
            known, other = about.setdefault(what, (own, path))
            if own != known:
                raise DataError(
                    f"{path} is of {what} {own}, {other} of {known}: a folder holds the results of one model"
                )
        for result in found.results:
            name = f"{result.measure}/{result.dataset}"
            if name in values:
                raise DataError(f"{path} and {came_from[name]} both hold {name}: leave one of them in {folder}")
            values[name], came_from[name] = result, path
    if not values:
        raise DataError(f"{folder}: no file of results there; megatron-sip-evaluate writes them by --output")
    return values


def make_tables(runs: Mapping[str, Values], numbers: Sequence[str] | None = None) -> list[Table]:
    """The published tables called `numbers`, each with a row for every run that has one of its columns.

    All of them when None, and behind them a table of each measure of the runs that has other columns than theirs.
    """
    published = json.loads(files("megatron_sip.evaluation").joinpath("published.json").read_text("utf-8"))
    known = [table["number"] for table in published["tables"]]
    if numbers is not None and (unknown := [number for number in numbers if number not in known]):
        raise DataError(f"--tables {unknown[0]}: known are {', '.join(known)}")
    found = []
    for table in published["tables"]:
        if numbers is not None and table["number"] not in numbers:
            continue
        for part in table["parts"]:
            heading = f"Table {table['number']}: {table['title']}"
            title = f"{heading}. {part['title']}" if part["title"] else heading
            columns = part["columns"]
            rows = [Row(row["model"], row["values"], [None] * len(columns), published=True) for row in part["rows"]]
            own = [_row(name, values, columns) for name, values in runs.items()]
            rows += [row for row in own if any(value is not None for value in row.values)]
            found.append(Table(title, columns, rows, other_samples(runs, columns)))
    return found if numbers is not None else found + _other_tables(runs, published["tables"])


def _other_tables(runs: Mapping[str, Values], published: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What the runs have and no published table shows, by measure."""
    shown = {column for table in published for part in table["parts"] for column in part["columns"]}
    measures: dict[str, dict[str, None]] = {}
    for values in runs.values():
        for column in values:
            if column not in shown:
                measures.setdefault(column.partition("/")[0], {})[column] = None
    tables = []
    for measure, columns in measures.items():
        rows = [_row(name, values, list(columns)) for name, values in runs.items() if values.keys() & columns.keys()]
        unit = "nats a token" if measure == NATS else "per cent"
        title, notes = f"Other numbers: {measure}, {unit}", other_samples(runs, list(columns))
        tables.append(Table(title, list(columns), rows, notes))
    return tables


def other_samples(runs: Mapping[str, Values], columns: Sequence[str]) -> list[str]:
    """For each column whose numbers are of another many samples in some runs than in others, who has how many."""
    notes = []
    for column in columns:
        counts = {name: values[column].samples for name, values in runs.items() if column in values}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            notes.append(f"{heading(column)}: not the same samples: {told}.")
    return notes


def _row(name: str, values: Values, columns: Sequence[str]) -> Row:
    cells: list[float | None] = []
    intervals: list[tuple[float, float] | None] = []
    for column in columns:
        result = values.get(column)
        value = average(column, values) if column in WEIGHTS else None if result is None else result.value
        interval = None if result is None else result.interval
        scale = 1 if column.startswith(f"{NATS}/") else 100
        cells.append(None if value is None else scale * value)
        intervals.append(None if interval is None else (scale * interval[0], scale * interval[1]))
    return Row(name, cells, intervals, published=False)


def heading(column: str) -> str:
    """A column's name as a reader sees it."""
    measure, _, dataset = column.partition("/")
    if not dataset:
        return f"{HEADINGS[measure]}, average"
    if measure in ("quality", "coherence"):
        return f"{HEADINGS[measure]}, {DATASETS.get(dataset, dataset)}"
    return dataset


def cell(row: Row, place: int, column: str = "") -> str:
    """Such as 86.3, or 86.3 [84.1, 88.2], of nats 2.9812; empty where there is no number."""
    value, interval = row.values[place], row.intervals[place]
    if value is None:
        return ""
    digits = 4 if column.startswith(f"{NATS}/") else 1
    bounds = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{value:.{digits}f}{bounds}"


def markdown(tables: Sequence[Table]) -> str:
    """GitHub's tables; rows of one's own in bold."""
    blocks = []
    for table in tables:
        head = ["model", *map(heading, table.columns)]
        lines = [f"### {table.title}", "", _line(head), _line(["---", *["---:"] * len(table.columns)])]
        for row in table.rows:
            name = row.model if row.published else f"**{row.model}**"
            lines.append(_line([name, *_cells(row, table)]))
        blocks.append("\n\n".join(["\n".join(lines), *table.notes]))
    return "\n\n".join(blocks) + "\n"


def _cells(row: Row, table: Table) -> list[str]:
    return [cell(row, place, column) for place, column in enumerate(table.columns)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def html(tables: Sequence[Table]) -> str:
    """A page that needs nothing else."""
    style = files("megatron_sip.evaluation").joinpath("report.css").read_text("utf-8")
    parts = []
    for table in tables:
        head = "".join(f"<th>{escape(text)}</th>" for text in ["model", *map(heading, table.columns)])
        rows = []
        for row in table.rows:
            name = escape(row.model) if row.published else f"<strong>{escape(row.model)}</strong>"
            cells = "".join(f"<td>{escape(text)}</td>" for text in _cells(row, table))
            rows.append(f"<tr><td>{name}</td>{cells}</tr>")
        parts.append(f"<h2>{escape(table.title)}</h2>\n<table><tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>")
        parts += [f"<p>{escape(note)}</p>" for note in table.notes]
    body = "\n".join(parts)
    head = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Evaluation</title>\n<style>{style}</style>'
    )
    return f"{head}\n<main>\n{body}\n</main>\n</html>\n"
