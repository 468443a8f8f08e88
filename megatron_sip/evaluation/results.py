"""Numbers about a model, as every command of megatron-sip-evaluate writes them and `table` reads them.

A file of results is JSON: what it is about (model, step, what it was measured with), and a `Result` for each dataset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sip.errors import DataError
from megatron_sip.files import described, read_json, write_atomically

FORMAT = "megatron-sip results 1"


@dataclass(frozen=True, slots=True)
class Result:
    """One number: `measure` of a model on `dataset` (names: docs/evaluation.md).

    value: a share from 0 to 1; of measure "nll" nats a token. samples: what it is the mean of. interval: 95%, None where there
    is none. failed: samples that got no answer, and are not in the mean.
    """

    measure: str
    dataset: str
    value: float
    samples: int
    interval: tuple[float, float] | None = None
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Results:
    """A file of them. about: model, step, and what they were measured with."""

    about: dict[str, Any]
    results: list[Result]


def write_results(path: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write a file of results, whole or not at all."""
    content = {"format": FORMAT, "about": dict(about), "results": [asdict(result) for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_results(path: Path) -> Results:
    """Inverse of `write_results`. Raises DataError; OSError."""
    content = read_json(path, "a file of results")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: no file of results; megatron-sip-evaluate writes one with --output")
    with described(path, "a file of results"):
        return Results({**content["about"]}, [_result(value) for value in content["results"]])


def _result(value: Mapping[str, Any]) -> Result:
    interval = value["interval"]
    return Result(**{**value, "interval": None if interval is None else tuple(interval)})
