"""How varied the continuations of a model are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_sip.errors import DataError
from megatron_sip.evaluation.diversity import SHARES, diversity
from megatron_sip.evaluation.generation import read_generations
from megatron_sip.evaluation.results import Result, write_results

ABOUT = "distinct n-grams, repetition and length of continuations"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which files."""
    parser.add_argument("generations", nargs="+", type=Path, help="files that generate wrote")
    parser.add_argument("--output", type=Path, help="file of results, of a single file of generations")


def run(given: argparse.Namespace) -> None:
    """Print what is found of each file; write the results of one."""
    if given.output is not None and len(given.generations) > 1:
        raise DataError(f"--output {given.output}: results are of one file of generations: name each by itself")
    files = {path: read_generations(path) for path in given.generations}
    for path, made in files.items():
        if not made.lines:
            raise DataError(f"{path}: no generation")
    found = {str(path): diversity([line.text for line in made.lines]) for path, made in files.items()}
    print(json.dumps(found, indent=2))
    if given.output is not None:
        [(path, made)] = files.items()
        values = found[str(path)]
        about = {**made.about, "generations": str(path), "of": made.header.get("dataset"), "words": values["words"]}
        results = [Result("diversity", name, values[name], len(made.lines)) for name in SHARES]
        write_results(given.output, about, results)
