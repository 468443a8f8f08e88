"""samples.jsonl of a run folder: what the judge saw and the policy learnt in some of the steps, for the report.

One prompt of every recorded step, a line each: its prefix's end, its candidates with their scores, and which of them became
the chosen, the rejected or the target. The steps are spread over the run, so that the file stays small however long it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.records import Candidate, Example, Group

FILE = "samples.jsonl"
RECORDED_STEPS = 50
PREFIX_CHARACTERS = 700
"""Of a prefix its end is shown; one more is kept, as a sign that there is more."""
CANDIDATES = 6
"""Of a group with more, those that were trained on and the best-scored others; of more that were trained on, as by GRPO, the
best and the worst."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleLog:
    """Where samples are written, and every how many steps."""

    path: Path
    interval: int

    @classmethod
    def of(cls, run_dir: Path, train_iters: int) -> SampleLog:
        """About RECORDED_STEPS samples of a run of `train_iters` steps."""
        return cls(run_dir / FILE, max(1, train_iters // RECORDED_STEPS))

    def record(self, step: int, groups: Sequence[Group], examples: Sequence[Example]) -> None:
        """Add a sample of step `step` (0 is the first) when it is due; a disk that is full costs samples, not the run."""
        if step % self.interval or not groups:
            return
        learnt = {example.task_index for example in examples}
        group = next((group for group in groups if group.task.index in learnt), groups[0])
        line = json.dumps(sample(step, group, examples)) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            log.warning("no sample of step %d is written: %s", step + 1, error)


def sample(step: int, group: Group, examples: Sequence[Example]) -> dict[str, Any]:
    """What a line holds; steps are counted from 1 there, as in metrics.jsonl. examples: all of the step."""
    own = [branch for example in examples if example.task_index == group.task.index for branch in example.branches]
    roles = {tuple(branch.ids): branch.role for branch in own}
    scores: Sequence[float | None] = group.scores or [None] * len(group.candidates)

    def rank(item: tuple[Candidate, float | None]) -> tuple[bool, float]:
        return (tuple(item[0].ids) not in roles, -(item[1] if item[1] is not None else 0.0))

    ranked = sorted(zip(group.candidates, scores, strict=True), key=rank)
    trained = sum(not rank(item)[0] for item in ranked)
    kept = ranked[:CANDIDATES]
    if trained > CANDIDATES:
        kept = ranked[: CANDIDATES // 2] + ranked[trained - CANDIDATES // 2 : trained]
    return {
        "step": step + 1,
        "prefix": group.task.prefix_text[-PREFIX_CHARACTERS - 1 :],
        "dropped": group.dropped,
        "candidates": [
            {"kind": made.kind, "text": made.text, "score": score, "role": roles.get(tuple(made.ids))}
            for made, score in kept
        ],
    }


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The samples by step, of a step recorded again after a restart the last; lines cut off by a kill are left out."""
    path = run_dir / FILE
    found: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
            if set(record) >= {"step", "prefix", "candidates"}:
                found[int(record["step"])] = record
        except (ValueError, TypeError):
            continue
    return [found[step] for step in sorted(found)]
