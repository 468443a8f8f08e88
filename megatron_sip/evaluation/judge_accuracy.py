"""How often a judge is right about labelled records (paper, table 8): by model and subset, in each order of the options.

    report = accuracy(questions, replies, model="Llama-3.1-8B-Instruct", seed=1234)

A verdict that cannot be read counts as wrong, as it does in training; a question that no server answered counts as nothing, and
both are counted. The interval resamples pairs: the two orders of the same texts are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sip.errors import DataError
from megatron_sip.evaluation.win_rate import interval
from megatron_sip.files import read_json_lines
from megatron_sip.judge.exam import Question, Reply
from megatron_sip.judge.labelled_tasks import judge_prompt

ALL = "all"
FIELDS = ("model", ALL, "failed", "subsets")
"""Of a report."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A question with its right verdict; `pair` is shared by the records that show the same texts in both orders."""

    question: Question
    verdict: str
    pair: str
    subset: str


@dataclass(frozen=True, slots=True)
class Marked:
    """What a reply is worth. right: share of its verdicts, unread ones among them, that are right. preferred: how far the
    right option was preferred, 0 .. 1; None where nothing was read. first, lean: how often option 1 was chosen, and how far it
    was preferred; None likewise, and of a criterion that compares nothing."""

    labelled: Labelled
    right: float
    preferred: float | None
    first: float | None
    lean: float | None
    asked: int
    unread: int


def read_labelled(path: Path, split: str | None = None) -> list[Labelled]:
    """The judgements of a file of records, of one split or all. Raises DataError, which names the line."""
    found = []
    for number, record in enumerate(read_json_lines(path, "a file of labelled judgements"), start=1):
        if not isinstance(record, dict) or "verdict" not in record:
            raise DataError(f"{path}: record {number} is no judgement: it has no field 'verdict'")
        if split is None or record.get("split") == split:
            found.append(_labelled(record, f"{path}: record {number}"))
    if not found:
        raise DataError(f"{path}: no record{f' of split {split}' if split else ''}")
    return found


def _labelled(record: Mapping[str, Any], where: str) -> Labelled:
    try:
        prompt = judge_prompt(str(record.get("criterion")))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    assert prompt.rule is not None
    if record["verdict"] not in prompt.rule.labels:
        labels = ", ".join(prompt.rule.labels)
        raise DataError(f"{where}: the verdict {record['verdict']!r} is none of {prompt.name}'s: {labels}")
    texts = {"prefix": record.get("prefix", ""), "reference": record.get("suffix", "")}
    texts |= {name: record.get(name) for name in ("candidate", "option_1", "option_2") if name in prompt.slots}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise DataError(f"{where}: field {wrong[0]!r} must be a text")
    question = Question(record["criterion"], texts)
    return Labelled(question, record["verdict"], str(record.get("pair", where)), str(record.get("subset", ALL)))


def marked(labelled: Labelled, reply: Reply) -> Marked | None:
    """None where no server answered."""
    if reply.failed is not None:
        return None
    values, verdicts = labelled.question.rule.values, len(reply.values) + reply.unread
    target, highest, lowest = values[labelled.verdict], max(values.values()), min(values.values())
    if len(values) == 2:  # of a soft verdict, whichever label it leans to
        leanings = [_towards(value, target, highest, lowest) for value in reply.values]
        right = sum(_decided(leaning) for leaning in leanings)
    else:
        leanings = [float(value == target) for value in reply.values]
        right = sum(leanings)
    is_pair = "option_1" in labelled.question.texts
    read = bool(reply.values)
    return Marked(
        labelled,
        right=right / verdicts,
        preferred=float(np.mean(leanings)) if read else None,
        first=float(np.mean([_decided(v) for v in reply.values])) if is_pair and read else None,
        lean=float(np.mean(reply.values)) if is_pair and read else None,
        asked=verdicts,
        unread=reply.unread,
    )


def _towards(value: float, target: float, highest: float, lowest: float) -> float:
    """How far a value leans to the label worth `target`, 0 .. 1."""
    share = (value - lowest) / (highest - lowest)
    return share if target == highest else 1 - share


def _decided(leaning: float) -> float:
    return 0.5 if leaning == 0.5 else float(leaning > 0.5)


def accuracy(labelled: Sequence[Labelled], replies: Sequence[Reply], model: str, seed: int) -> dict[str, Any]:
    """Figures of all records and of each subset, as JSON; see `_figures`."""
    marks = [mark for one, reply in zip(labelled, replies, strict=True) if (mark := marked(one, reply)) is not None]
    if not marks:
        reasons = ", ".join(sorted({reply.failed for reply in replies if reply.failed is not None}))
        raise DataError(f"no question was answered ({reasons}): look at the judge's server")
    subsets = sorted({mark.labelled.subset for mark in marks})
    return {
        "model": model,
        ALL: _figures(marks, seed),
        "failed": len(labelled) - len(marks),
        "subsets": {name: _figures([m for m in marks if m.labelled.subset == name], seed) for name in subsets},
    }


def _figures(marks: Sequence[Marked], seed: int) -> dict[str, Any]:
    """accuracy: mean over records, unread verdicts as wrong, with its 95% interval; by_verdict: where that verdict is right,
    which for pairs is by order. both_orders: share of the pairs whose right option is preferred on the mean over both
    orders; in_each_order: in each of them. first_option: how often option 1 was chosen; first_option_lean: its mean preference,
    of soft verdicts a probability."""
    right = np.array([mark.right for mark in marks])
    verdicts = sorted({mark.labelled.verdict for mark in marks})
    asked, unread = (sum(getattr(mark, name) for mark in marks) for name in ("asked", "unread"))
    figures: dict[str, Any] = {
        "records": len(marks),
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(interval(right, [mark.labelled.pair for mark in marks], seed)),
        "by_verdict": {name: float(right[[m.labelled.verdict == name for m in marks]].mean()) for name in verdicts},
        "verdicts": asked,
        "unread": unread,
    }
    if firsts := [mark.first for mark in marks if mark.first is not None]:
        figures["first_option"] = float(np.mean(firsts))
        figures["first_option_lean"] = float(np.mean([mark.lean for mark in marks if mark.lean is not None]))
    pairs: dict[str, list[Marked]] = {}
    for mark in marks:
        pairs.setdefault(mark.labelled.pair, []).append(mark)
    whole = [[m.preferred for m in pair if m.preferred is not None] for pair in pairs.values() if len(pair) == 2]
    if read := [pair for pair in whole if len(pair) == 2]:
        figures["pairs"] = len(read)
        figures["both_orders"] = float(np.mean([_decided(float(np.mean(pair))) for pair in read]))
        figures["in_each_order"] = float(np.mean([min(map(_decided, pair)) == 1 for pair in read]))
    return figures


def markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Table 8: a row a model, a column a subset; below it each model's further figures."""
    subsets = list(dict.fromkeys(name for report in reports for name in report["subsets"]))
    head = ["accuracy", *subsets, ALL]
    rows = [
        [report["model"], *(_percent(report["subsets"].get(name)) for name in subsets), _percent(report[ALL])]
        for report in reports
    ]
    orders = list(dict.fromkeys(name for report in reports for name in report[ALL]["by_verdict"]))
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "95% interval": lambda figures: " - ".join(f"{100 * edge:.1f}" for edge in figures["accuracy_ci95"]),
        **{f"right is {name}": _share_of("by_verdict", name) for name in orders},
        "mean of both orders": _share_of("both_orders"),
        "right in each order": _share_of("in_each_order"),
        "option 1 chosen": _share_of("first_option"),
        "its mean": _share_of("first_option_lean"),
        "unread": lambda figures: f"{figures['unread']} of {figures['verdicts']}",
        "records": lambda figures: str(figures["records"]),
    }
    details = [[report["model"], *(column(report[ALL]) for column in columns.values())] for report in reports]
    failed = [
        f"{report['model']}: {report['failed']} questions without an answer." for report in reports if report["failed"]
    ]
    return "\n\n".join([table(head, rows), table(["all records", *columns], details), *failed])


def _percent(figures: Mapping[str, Any] | None) -> str:
    return "" if figures is None else f"{100 * figures['accuracy']:.1f}"


def _share_of(*path: str) -> Callable[[Mapping[str, Any]], str]:
    def shown(figures: Mapping[str, Any]) -> str:
        value: Any = figures
        for name in path:
            value = value.get(name) if value is not None else None
        return "" if value is None else f"{100 * value:.1f}"

    return shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
