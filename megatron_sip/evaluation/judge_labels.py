"""Which labels a judge gives, by criterion and version, and how far two runs agree (paper, tables 10 to 13)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.evaluation.judge_accuracy import table
from megatron_sip.files import read_json_lines
from megatron_sip.judge.exam import Question, Reply
from megatron_sip.judge.labelled_tasks import judge_prompt

UNREAD = "unread"
FAILED = "no answer"
FIELDS = ("model", "continuations", "criteria")
"""Of a report."""


def read_continuations(path: Path, candidate_field: str | None, limit: int | None = None) -> list[dict[str, str]]:
    """Texts by slot of each record: prefix, reference (its suffix) and candidate (`candidate_field`, else the suffix itself).

    Raises DataError, which names the record.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit}: at least 1 is needed; leave it out to ask about all")
    found = []
    for number, record in enumerate(read_json_lines(path, "a file of prefixes and suffixes")[:limit], start=1):
        names = {"prefix": "prefix", "reference": "suffix", "candidate": candidate_field or "suffix"}
        for name in names.values():
            if not isinstance(record, dict) or not isinstance(record.get(name), str):
                raise DataError(f"{path}: record {number}: field {name!r} must be a text")
        found.append({slot: record[name] for slot, name in names.items()})
    if not found:
        raise DataError(f"{path}: no record")
    return found


def questions(continuations: Sequence[Mapping[str, str]], criteria: Sequence[str]) -> list[Question]:
    """Every criterion about every continuation, criterion by criterion. Raises DataError for one that is none, or that
    compares pairs."""
    for name in criteria:
        try:
            prompt = judge_prompt(name)
        except (ValueError, OSError) as error:
            raise DataError(f"--criteria {name}: {error}") from error
        if prompt.kind != "pointwise":
            raise DataError(
                f"--criteria {name}: labels are of single texts: name pointwise criteria, such as factuality:v4"
            )
    return [Question(name, texts) for name in criteria for texts in continuations]


def label_run(
    continuations: Sequence[Mapping[str, str]], criteria: Sequence[str], replies: Sequence[Reply], model: str
) -> dict[str, Any]:
    """As JSON: the label that each criterion gave to each continuation, and how often it gave which."""
    given = iter(replies)
    labels = {name: [_label(name, next(given)) for _ in continuations] for name in criteria}
    return {
        "model": model,
        "continuations": _digests(continuations),
        "criteria": {
            name: {"counts": dict(Counter(own)), "order": list(_labels(name)), "labels": own}
            for name, own in labels.items()
        },
    }


def _label(criterion: str, reply: Reply) -> str:
    """The label that most of the verdicts name, of equals the first; or why there is none."""
    if reply.failed is not None:
        return FAILED
    if not reply.values:
        return UNREAD
    [(value, _), *_] = Counter(reply.values).most_common()
    return next(label for label, worth in _labels(criterion).items() if worth == value)


def _labels(criterion: str) -> Mapping[str, float]:
    rule = judge_prompt(criterion).rule
    assert rule is not None
    return rule.values


def require_same(continuations: Sequence[Mapping[str, str]], report: Mapping[str, Any], name: str) -> None:
    """Raises DataError for a report about other continuations, with which nothing can be compared."""
    if report["continuations"] != _digests(continuations):
        raise DataError(f"--beside {name}: {report['model']} was asked about other continuations: use the same file")


def _digests(continuations: Sequence[Mapping[str, str]]) -> list[str]:
    return [_digest(texts) for texts in continuations]


def _digest(texts: Mapping[str, str]) -> str:
    content = "\0".join(texts[name] for name in sorted(texts))
    return hashlib.blake2b(content.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def agreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Share of the same continuations (see `require_same`) to which both runs gave the same label, by criterion that both
    asked; of those that both gave one to."""
    shares = {}
    for name in one["criteria"]:
        if name in other["criteria"]:
            pairs = zip(one["criteria"][name]["labels"], other["criteria"][name]["labels"], strict=True)
            both = [a == b for a, b in pairs if {a, b}.isdisjoint({UNREAD, FAILED})]
            if both:
                shares[name] = float(np.mean(both))
    return shares


def markdown(run: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Tables 10 to 12 for each run (counts with shares of all), and table 13: how far the first agrees with each other one."""
    parts = [_shares(one) for one in (run, *others)]
    for other in others:
        shares = agreement(run, other)
        rows = [[name, f"{100 * share:.2f}%"] for name, share in shares.items()]
        if rows:
            values = 100 * np.array(list(shares.values()))
            rows.append(["least - most (mean)", f"{values.min():.2f}% - {values.max():.2f}% ({values.mean():.2f}%)"])
            parts.append(table([f"{run['model']} vs. {other['model']}", "agreement"], rows))
    return "\n\n".join(parts)


def _shares(run: Mapping[str, Any]) -> str:
    labels = list(dict.fromkeys(label for own in run["criteria"].values() for label in own["order"]))
    extra = [name for name in (UNREAD, FAILED) if any(name in own["counts"] for own in run["criteria"].values())]
    total = len(run["continuations"])
    rows = [
        [name, *(_count(own["counts"].get(label, 0), total) for label in (*labels, *extra))]
        for name, own in run["criteria"].items()
    ]
    return table([f"{run['model']}, {total} continuations", *labels, *extra], rows)


def _count(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f}%)"
