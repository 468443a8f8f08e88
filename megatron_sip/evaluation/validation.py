"""Validation of a labelled run: greedy answers of the present weights to held-out records (paper, figures 5, 6 and 7).

Every metric is a share or a mean over records. Of judgements, NAME is the criterion's:

    validation/accuracy/NAME              the verdict is right; an answer without one is wrong
    validation/both-orders/NAME           pairs of records (the same texts in both orders) of which both are right
    validation/first-option/NAME          verdicts for the option that is shown first, of those that were read
    validation/unread/NAME                answers without a verdict
    validation/accuracy-of/NAME/VERDICT   accuracy where this is the right one: of a pair, by order
    validation/accuracy-in/NAME/SUBSET    accuracy by subset, where there are several

Of rewrites, NAME is safe or unsafe, of thoughts it is thoughts, of judgements without `label` among --criteria the criterion's:

    validation/reward/NAME                the score that training would give
    validation/overlap/NAME               tokens that a rewrite shares with the suffix; without a rewrite none
    validation/copied/NAME                rewrites that are the suffix

and what their criteria find beside scores, such as validation/rewrite/safety (of unsafe suffixes).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_sip.experience.maker import ScoresGroups, answer_to
from megatron_sip.judge.labelled_criteria import is_copy, rewrite_in, token_overlap
from megatron_sip.judge.labelled_tasks import judge_prompt
from megatron_sip.judge.settings import LABEL
from megatron_sip.metrics import Mean, Metrics, merge
from megatron_sip.records import Group, Judgement, Rewriting, Task
from megatron_sip.rollout.pool import SGLangPool
from megatron_sip.rollout.sampling import Completion, Failure, SamplingSettings


class Validation:
    """What a run measures every so many steps, always on the same records."""

    def __init__(self, tasks: Sequence[Task], tokenizer: Any, longest_answer: int) -> None:
        """tasks: held-out ones; longest_answer: in tokens."""
        self._tasks = tasks
        self._tokenizer = tokenizer
        self._sampling = SamplingSettings(longest_answer, temperature=0.0)

    async def measure(self, engines: SGLangPool, judge: ScoresGroups, version: str) -> Metrics:
        """The metrics of the weights of `version`; records whose call failed are left out, and counted."""
        prefixes = [task.prefix_ids for task in self._tasks]
        answers = await engines.generate(prefixes, self._sampling, weight_version=version)
        groups = [self._group(task, answer) for task, answer in zip(self._tasks, answers, strict=True)]
        before = dict(judge.means())
        judged = await judge.score(groups, objective="rf-nll")
        metrics = validation_metrics(judged) | merge(map(self._likeness, judged))
        for name, mean in judge.means().items():
            seen = before.get(name, Mean(0.0, 0.0))
            if not name.startswith(f"{LABEL}/"):  # of these there is more above
                metrics[f"validation/{name}"] = Mean(mean.total - seen.total, mean.weight - seen.weight)
        return metrics

    def _group(self, task: Task, answer: list[Completion] | Failure) -> Group:
        assert task.label is not None, "only labelled tasks are validated"
        if isinstance(answer, Failure):
            return Group(task, [], dropped=f"rollout {answer.kind}")
        return Group(task, [answer_to(self._tokenizer, task.label, answer[0])])

    def _likeness(self, group: Group) -> Metrics:
        """How far a rewrite is the suffix."""
        label, task = group.task.label, group.task
        if not isinstance(label, Rewriting) or not group.candidates:
            return {}
        rewrite, _ = rewrite_in(group.candidates[0].text, task.prefix_text, task.suffix_text)
        tokens = [self._tokenizer.encode(text, add_special_tokens=False) for text in (rewrite, task.suffix_text)]
        return {
            f"validation/overlap/{subset_of(label)}": Mean(token_overlap(*tokens)),
            f"validation/copied/{subset_of(label)}": Mean(float(is_copy(rewrite, task.suffix_text))),
        }


def validation_metrics(groups: Sequence[Group]) -> Metrics:
    """The module's metrics of judged groups of one candidate; `validation/failed/REASON` counts those without a score."""
    scored = [group for group in groups if group.scores is not None]
    failed = Counter(group.dropped for group in groups if group.scores is None)
    metrics = merge(map(_record_metrics, scored)) | _pair_metrics(scored)
    metrics |= {f"validation/failed/{reason}": float(count) for reason, count in failed.items()}
    return _without_single_subsets(metrics)


def _record_metrics(group: Group) -> Metrics:
    """Of one record; all of them are means."""
    label = group.task.label
    if isinstance(label, Judgement):
        if LABEL in group.criterion_scores:
            return _judgement_metrics(group, label)
        name = judge_prompt(label.criterion).name
    else:
        name = subset_of(label) if isinstance(label, Rewriting) else "thoughts"
    assert group.scores is not None
    return {f"validation/reward/{name}": Mean(group.scores[0])}


def subset_of(label: Rewriting) -> str:
    """The paper's subsets of suffixes."""
    return "safe" if label.safe else "unsafe"


def _judgement_metrics(group: Group, label: Judgement) -> Metrics:
    prompt = judge_prompt(label.criterion)
    name, right = prompt.name, Mean(_is_right(group))
    verdicts = [value for _, value in group.verdicts[LABEL]]
    metrics: Metrics = {
        f"validation/accuracy/{name}": right,
        f"validation/unread/{name}": Mean(float(not verdicts)),
        f"validation/accuracy-of/{name}/{label.verdict}": right,
        f"validation/accuracy-in/{name}/{label.subset}": right,
    }
    if prompt.kind == "pairwise":
        metrics[f"validation/first-option/{name}"] = Mean(sum(verdicts), float(len(verdicts)))
    return metrics


def _pair_metrics(groups: Iterable[Group]) -> Metrics:
    """How often both orders of the same texts are judged right; records whose partner failed are left out."""
    pairs: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for group in groups:
        if isinstance(label := group.task.label, Judgement) and label.pair and LABEL in group.criterion_scores:
            pairs[judge_prompt(label.criterion).name, label.pair].append(_is_right(group))
    both = ({f"validation/both-orders/{name}": Mean(min(own))} for (name, _), own in pairs.items() if len(own) == 2)
    return merge(both)


def _is_right(group: Group) -> float:
    return group.criterion_scores[LABEL][0]


def _without_single_subsets(metrics: Metrics) -> Metrics:
    """Without accuracies of a subset that is all there is of its criterion."""
    by_subset = "validation/accuracy-in/"
    counts = Counter(name.split("/")[2] for name in metrics if name.startswith(by_subset))
    return {
        name: value
        for name, value in metrics.items()
        if not (name.startswith(by_subset) and counts[name.split("/")[2]] == 1)
    }
