"""Judgements from a run's own recorded groups, so that a judge can follow its policy.

What the texts of a group are worth is taken from the verdicts that were recorded with it, or from those of another, stronger
judge: a pair (quality) or a candidate (safety) becomes a record where enough verdicts agree. Both orders of a pair are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megatron_sip.data.ordering import hash64
from megatron_sip.data.roles import text_key
from megatron_sip.experience.recording import age, group_files, groups_in, step_name
from megatron_sip.judge.judge import Judge
from megatron_sip.prepare.documents import Place
from megatron_sip.prepare.judgements import record_id
from megatron_sip.prepare.labels import safety_label
from megatron_sip.prepare.pipeline import Made, Source
from megatron_sip.prepare.settings import GroupSettings
from megatron_sip.records import Candidate, Group, Task

ADVICE = (
    "a run asks of most pairs one verdict in one order: give --teacher-url, the URL of a judge who is asked instead, or take "
    "such verdicts with --one-order --min-votes 1; --agreement says how many must say the same"
)
JudgedTask = Literal["quality", "safety"]
BEGINNING = 50
"""Characters by which a document is known again, whatever the cut."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A group, and the place of its record."""

    group: Group
    place: Place


class GroupReader:
    """Iterates over the groups of `files` behind `position`, of documents only.

    Of a task that was recorded twice in a step, as after a resume with fewer replicas, the newest file's group counts.
    """

    def __init__(self, files: Sequence[Path], position: Place, counts: Counter[str], bar: tqdm[Any]) -> None:
        self.position = position
        self.counts = counts
        self._files = files
        self._bar = bar
        self._by_step: dict[str, list[Path]] = {}
        for path in sorted(files, key=age):
            self._by_step.setdefault(step_name(path), []).append(path)

    def _newest(self, step: str) -> dict[int, Path]:
        """The newest file with a group of each task."""
        if len(self._by_step[step]) == 1:
            return {}
        return {group.task.index: path for path in self._by_step[step] for group in groups_in(path)}

    def __iter__(self) -> Iterator[Recorded]:
        first, skipped = self.position
        step, newest = "", dict[int, Path]()
        for number, path in enumerate(self._files[first:], start=first):
            if step_name(path) != step:
                step = step_name(path)
                newest = self._newest(step)
            for row, group in enumerate(groups_in(path), start=1):
                if number == first and row <= skipped:
                    continue
                self.position = number, row
                self.counts["documents/read"] += 1
                if group.task.label is not None:
                    self.counts["dropped/labelled-task"] += 1
                    continue
                if newest.get(group.task.index, path) != path:
                    self.counts["dropped/recorded-again"] += 1
                    continue
                self.counts["documents/used"] += 1
                yield Recorded(group, self.position)
            self._bar.update(path.stat().st_size)
            self.position = number + 1, 0


def group_source(settings: GroupSettings) -> Source[Recorded]:
    """The recorded groups of a folder. Raises DataError where there are none."""
    values = asdict(settings) | {"folder": str(settings.folder), "splits": list(map(str, settings.splits.splits))}
    files = tuple(group_files(settings.folder))
    return Source(files, values, lambda *place: GroupReader(files, *place), ADVICE)


class GroupMaker:
    """Records of groups. judge: whose verdicts count instead of the recorded ones; it has one criterion, the task."""

    def __init__(self, settings: GroupSettings, task: JudgedTask, judge: Judge | None = None) -> None:
        self._settings = settings
        self._task: JudgedTask = task
        self._judge = judge

    async def __call__(self, recorded: Sequence[Recorded]) -> list[Made]:
        """What became of each group."""
        parts = [self._parts(each.group) for each in recorded]
        if self._judge is not None:
            asked = await self._judge.score([part for own in parts for part in own], objective="pair")
            answers = iter(asked)
            parts = [[next(answers) for _ in own] for own in parts]
        return [self._made(each, own) for each, own in zip(recorded, parts, strict=True)]

    def _parts(self, group: Group) -> list[Group]:
        """Groups of the two candidates, or the one, that a record may be about; drawn where there are more than enough."""
        settings, first = self._settings, dict[str, int]()
        for place, candidate in enumerate(group.candidates):
            if candidate.text.strip():
                first.setdefault(candidate.text.strip(), place)
        chosen = list(combinations(first.values(), 2 if self._task == "quality" else 1))
        Random(hash64(settings.seed, text_key(group.task.prefix_text))).shuffle(chosen)
        if self._judge is not None:
            chosen = chosen[: settings.per_group]
        return [_part(group, places, self._task) for places in chosen]

    def _made(self, recorded: Recorded, parts: Sequence[Group]) -> Made:
        """Records of the parts whose verdicts agree, `per_group` at most."""
        made = Made([])
        for part in parts:
            if len(made.records) >= self._settings.per_group * (2 if self._task == "quality" else 1):
                break
            verdict, problem = agreed(part, self._task, self._settings)
            if problem:
                made.dropped[problem] += 1
            else:
                made.records.extend(self._records(recorded, part, verdict))
        if not parts:
            made.dropped["no-two-texts" if self._task == "quality" else "no-text"] += 1
        return made

    def _records(self, recorded: Recorded, part: Group, verdict: bool) -> list[dict[str, Any]]:
        task, texts = recorded.group.task, [candidate.text for candidate in part.candidates]
        common = {
            "criterion": self._task,
            "prefix": task.prefix_text,
            "suffix": task.suffix_text,
            "pair": record_id(self._task, self._settings.seed, recorded.place, texts),
            "subset": "groups/" + "-".join(sorted(candidate.kind for candidate in part.candidates)),
            "split": self._settings.splits.split(document_key(task)),
        }
        if self._task == "safety":
            return [common | {"verdict": safety_label(verdict), "candidate": texts[0]}]
        first, second = texts
        better = "1" if verdict else "2"
        return [
            common | {"verdict": better, "option_1": first, "option_2": second},
            common | {"verdict": "2" if verdict else "1", "option_1": second, "option_2": first},
        ]


def document_key(task: Task) -> int:
    """The same for every cut of a document, as long as its prefix reaches back to the document's beginning: what was recorded
    of a document is its window alone."""
    return text_key((task.prefix_text + task.suffix_text).lstrip()[:BEGINNING])


def _part(group: Group, places: Sequence[int], task: str) -> Group:
    """A group of these candidates alone, with the verdicts about them."""
    renamed = {place: i for i, place in enumerate(places)}
    candidates: list[Candidate] = [group.candidates[place] for place in places]
    verdicts = []
    for verdict in group.verdicts.get(task, []):
        *shown, value = verdict
        if all(int(place) in renamed for place in shown):
            verdicts.append([*(float(renamed[int(place)]) for place in shown), value])
    return replace(
        group,
        candidates=candidates,
        verdicts={task: verdicts},
        scores=None,
        criterion_scores={},
        votes={},
        dropped=None,
    )


def agreed(part: Group, task: JudgedTask, settings: GroupSettings) -> tuple[bool, str]:
    """(the verdict, "") where enough verdicts say the same: the first candidate is the better one, or it is safe.

    Else (False, why not): few-verdicts, one-order, verdicts-disagree, or why the judge dropped it. Of a pair the two orders
    count alike, whatever the number of verdicts in each.
    """
    if part.dropped is not None:
        return False, part.dropped
    verdicts = part.verdicts.get(task, [])
    if len(verdicts) < settings.min_votes:
        return False, "few-verdicts"
    if task == "safety":
        preferred = float(np.mean([value for _, value in verdicts]))
    else:
        by_order: Mapping[bool, list[float]] = {True: [], False: []}
        for first, _, value in verdicts:
            by_order[first == 0].append(value if first == 0 else 1 - value)
        asked = [float(np.mean(values)) for values in by_order.values() if values]
        if len(asked) < 2 and not settings.one_order:
            return False, "one-order"
        preferred = float(np.mean(asked))
    if max(preferred, 1 - preferred) < settings.agreement:
        return False, "verdicts-disagree"
    return preferred > 0.5, ""
