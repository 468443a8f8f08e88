"""Tasks of lm-eval by name or from local files, run on any model of lm-eval, and what of their metrics is a `Result`."""

from __future__ import annotations

import difflib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from megatron_sip.errors import DataError
from megatron_sip.evaluation.results import Result
from megatron_sip.evaluation.win_rate import wilson_interval

PRESETS = {
    "standard": ("boolq", "piqa", "social_iqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "mmlu"),
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
}
FACTUALITY = {"truthfulqa_mc1": "truthfulqa-mc1", "truthfulqa_mc2": "truthfulqa-mc2"}
"""Tasks that the paper counts among factuality, by their names there."""
FEW_SHOT = {"mmlu": 5}
"""Of tasks that leave it open; all others get none (paper, section 3.3)."""
METRICS = ("acc", "exact_match")
"""What is taken as a task's value, first come first: `acc` is what the paper's numbers look like."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """What was asked for. groups: each name's leaf tasks, with themselves for a task that has none. loaded: lm-eval's own."""

    groups: Mapping[str, Sequence[str]]
    loaded: dict[str, Any]


def load_tasks(names: Sequence[str], include_path: Sequence[Path], num_fewshot: int | None) -> Tasks:
    """Tasks, groups and tags of lm-eval, those in `include_path` first, and PRESETS.

    num_fewshot: examples before each question, but for tasks whose own files forbid them.

    Raises:
        DataError: a name that is not known, a task whose data cannot be had, or one that two names hold: with the examples of
            the one and the questions of the other it would be neither's.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line for each task that local files replace
    datasets.disable_progress_bars()
    for folder in include_path:
        if not any(folder.glob("**/*.yaml")):
            raise DataError(f"--include-path {folder}: no folder with task files (*.yaml) of lm-eval")
    wanted = list(dict.fromkeys(part for name in names for part in PRESETS.get(name, (name,))))
    manager = _task_files(wanted, list(include_path))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    groups: dict[str, list[str]] = {}
    for name in wanted:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*PRESETS, *manager.all_tasks], n=3)
            raise DataError(f"--tasks {name}: lm-eval has no such task; near: {', '.join(near) or 'none'}")
        try:
            found: Any = manager.load([name])
        except Exception as error:  # whatever a loader of data sets, or a task's own code, raises
            raise DataError(
                f"--tasks {name}: {type(error).__name__}: {error}. Where no hub is reached, give its local files by "
                "--include-path; tools/fetch_eval_sets.py makes those of the standard tasks"
            ) from error
        for task in found["tasks"].values():
            _set_few_shot(task, num_fewshot, FEW_SHOT.get(name, 0))
        # A group that says nothing of a number of its own is a list of tasks, as a tag is.
        is_one = name in found["groups"] and found["groups"][name].has_aggregation
        groups |= {name: list(found["tasks"])} if is_one else {task: [task] for task in found["tasks"]}
        for part, values in found.items():
            loaded[part] |= values
    _refuse_shared(groups)
    return Tasks(groups, loaded)


def _refuse_shared(groups: Mapping[str, Sequence[str]]) -> None:
    holder: dict[str, str] = {}
    for name, leaves in groups.items():
        for leaf in leaves:
            other = holder.setdefault(leaf, name)
            if other != name:
                raise DataError(
                    f"--tasks {other} {name}: both ask {leaf}: evaluate one of them by a command and an --output of its own"
                )


def _task_files(names: Sequence[str], include_path: list[Path]) -> TaskManager:
    own = TaskManager(include_path=include_path, include_defaults=False)
    if all(name in own.task_index for name in names):
        return own  # lm-eval's thousands of files take seconds to read
    return TaskManager(include_path=include_path)


def _set_few_shot(task: Any, asked: int | None, usual: int) -> None:
    own = task.get_config("num_fewshot")
    if own is None:
        task.set_config(key="num_fewshot", value=usual if asked is None else asked)
    elif own and asked is not None:  # a task that says 0 itself stays there, as with lm-eval's own command
        task.set_config(key="num_fewshot", value=asked)
    if asked and task.get_config("num_fewshot") == asked and _examples_are_questions(task):
        raise DataError(
            f"--num-fewshot {asked}: {task.task_name} has no examples but the questions that are asked, and their answers with "
            "them: leave the flag out, or name tasks that have a fewshot_split or a training split"
        )
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _examples_are_questions(task: Any) -> bool:
    """Whether lm-eval would draw a task's examples from the split that it asks."""
    chosen = task.fewshot_cfg
    if chosen.split is not None or chosen.samples is not None or task.has_training_docs():
        return False
    return bool(task.has_validation_docs() != task.has_test_docs())


def run_tasks(model: LM, tasks: Tasks, limit: int | None) -> dict[str, Any]:
    """lm-eval's results of the first `limit` questions of each task, with their samples; of a group, of its tasks in equal
    parts."""
    random.seed(DEFAULT_RANDOM_SEED)  # as lm-eval's own command begins
    np.random.seed(DEFAULT_OTHER_SEED)
    samples = None if limit is None else first_questions(tasks, limit)
    found = evaluate(model, tasks.loaded, samples=samples, bootstrap_iters=0, log_samples=True)
    assert found is not None
    return dict(found)


def first_questions(tasks: Tasks, limit: int) -> dict[str, list[int]]:
    """The places of the questions that are asked, by leaf task."""
    chosen = {}
    for leaves in tasks.groups.values():
        for name in leaves:
            questions = min(math.ceil(limit / len(leaves)), len(tasks.loaded["tasks"][name].eval_docs))
            chosen[name] = list(range(questions))
    return chosen


def as_results(tasks: Tasks, found: Mapping[str, Any]) -> tuple[list[Result], dict[str, dict[str, float]]]:
    """A Result for each task or group asked for, and all metrics of each, which also hold those that are no share."""
    results, metrics = [], {}
    for name, leaves in tasks.groups.items():
        values = found["results"][name] if name in found["results"] else found["groups"][name]
        numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
        metrics[name] = {_unfiltered(key): value for key, value in numbers.items() if "_stderr" not in key}
        value = next((numbers[key] for metric in METRICS for key in numbers if key.split(",")[0] == metric), None)
        if value is None:
            continue
        samples = sum(found["n-samples"][leaf]["effective"] for leaf in leaves)
        measure = "factuality" if name in FACTUALITY else "standard"
        interval = wilson_interval(value, samples)
        results.append(Result(measure, FACTUALITY.get(name, name), value, samples, interval))
    return results, metrics


def questions_of(tasks: Tasks, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each question gave: the name that was asked for, its leaf task, its place there, lm-eval's hash of what it was asked
    with, and those of its metrics that are numbers, by the names that they have in `as_results`."""
    for name, leaves in tasks.groups.items():
        for leaf in leaves:
            lines: dict[int, dict[str, Any]] = {}
            for sample in found["samples"][leaf]:  # one by filter
                asked = {"question": sample["doc_id"], "prompt_hash": sample["prompt_hash"]}
                line = lines.setdefault(sample["doc_id"], {"dataset": name, "task": leaf, **asked})
                values = {_unfiltered(f"{metric},{sample['filter']}"): sample[metric] for metric in sample["metrics"]}
                line |= {metric: float(value) for metric, value in values.items() if isinstance(value, int | float)}
            yield from lines.values()


def _unfiltered(metric: str) -> str:
    return metric.removesuffix(",none")
