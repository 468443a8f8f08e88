"""How varied the continuations of a model are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_sip.evaluation.diversity import diversity
from megatron_sip.evaluation.generation import read_generations

ABOUT = "distinct n-grams, repetition and length of continuations"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which files."""
    parser.add_argument("generations", nargs="+", type=Path, help="files that generate wrote")


def run(given: argparse.Namespace) -> None:
    """Print a line for each file."""
    found = {str(path): diversity([line.text for line in read_generations(path).lines]) for path in given.generations}
    print(json.dumps(found, indent=2))
