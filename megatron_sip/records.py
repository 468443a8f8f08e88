"""The records that flow through one step; nothing else is passed between the rooms of this package.

Task -> Candidate -> Group -> Example (a prefix with its branches) -> packed rows. All are frozen, hold token ids as plain
lists of ints and no tensors, so that they pickle small, compare by value and can be written as JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

CandidateKind = Literal["suffix", "rewrite", "rollout"]
CANDIDATE_KINDS: tuple[CandidateKind, ...] = ("suffix", "rewrite", "rollout")

Role = Literal["chosen", "rejected", "target", "sampled"]
"""What a branch is trained as: one side of a DPO pair, a plain NLL target, or one of GRPO's samples."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of a task that is a filled judge prompt (paper section 3.1): what the right answer is.

    criterion: the prompt's name or file, as --criteria spells it; verdict: the right one of its labels. forced: the answer
    was begun up to the label, so that it consists of the label alone. pair: equal in the records that show the same texts
    in both orders. subset: where the record comes from, for accuracies by subset. special_marks: answers are read with their
    special tokens, which are marks of reasoning.
    """

    criterion: str
    verdict: str
    forced: bool
    pair: str
    subset: str
    special_marks: bool = False


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Of a task that is a filled rewriter prompt: whether its suffix is safe, and so to be copied (paper, equation 1).

    special_marks: as of a `Judgement`.
    """

    safe: bool
    subset: str
    special_marks: bool = False


@dataclass(frozen=True, slots=True)
class Thinking:
    """Of a task whose rollouts are a thought, `end_mark`, and then the predicted suffix (the paper's later version)."""

    end_mark: str
    subset: str


Label = Judgement | Rewriting | Thinking
"""What a labelled task knows beside its texts."""


@dataclass(frozen=True, slots=True)
class Task:
    """One generation task: of a document, its suffix after a prefix (paper section 2.1), or a labelled one.

    `index` is the number of tasks drawn before it in the run: with the seed it determines the task completely.
    `prefix_ids` is what the policy continues. `prefix_text` and `suffix_text` are what a judge is shown: of a document and of
    a `Thinking` task the texts before and after the cut, of a `Rewriting` task those that are rewritten (not the prompt), of a
    `Judgement` the prompt and the right label; of a labelled task `suffix_ids` is empty.
    """

    index: int
    prefix_ids: list[int]
    suffix_ids: list[int]
    prefix_text: str
    suffix_text: str
    label: Label | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible continuation of a task's prefix.

    `logprobs` are the engine's log-probs of `ids`, natural log, at `weight_version`; both only for rollouts. `truncated`: the
    rollout ended at the limit of its length, not by itself.
    """

    kind: CandidateKind
    ids: list[int]
    text: str
    logprobs: list[float] | None = None
    weight_version: str | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A task with its candidates and, once judged, one combined score per candidate.

    `criterion_scores` keeps each criterion's score per candidate and `votes` the number of verdicts behind them (ints
    per candidate). `verdicts` records each of them as it was given: [first shown, second shown, how far the first was
    preferred] of a pair, [candidate, value] of one candidate, by place in `candidates`. `pivot` is a text that the judge
    compared them with and that does not compete; its place in `verdicts` is -1. A judged group holds the candidates that
    have scores: the judge leaves out, and counts, those that lack their verdicts. `dropped` names the reason when the group
    cannot be used; its scores are then None. An error never becomes a score.
    """

    task: Task
    candidates: list[Candidate]
    scores: list[float] | None = None
    criterion_scores: dict[str, list[float]] = field(default_factory=dict)
    votes: dict[str, list[int]] = field(default_factory=dict)
    verdicts: dict[str, list[list[float]]] = field(default_factory=dict)
    dropped: str | None = None
    pivot: Candidate | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `group_from_json` turns back into an equal Group."""
        record = asdict(self)
        if self.task.label is not None:
            record["task"]["label"]["type"] = type(self.task.label).__name__
        return record


@dataclass(frozen=True, slots=True)
class Branch:
    """A completion of an example's prefix, and what it is trained as.

    `advantage` is GRPO's, already normalised over the group; other objectives need none. `kind` says where the branch came
    from, for metrics. `engine_logprobs` is what the engine thought of its tokens (None unless it is a rollout), for a metric
    and by which GRPO weighs its tokens.
    """

    ids: list[int]
    role: Role
    kind: CandidateKind
    advantage: float | None = None
    engine_logprobs: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """What the trainer learns from: branches of one prefix, a chosen and a rejected one (DPO), samples (GRPO) or
    targets.

    head: tokens at the prefix's left, such as a control text, that stay when a prefix is too long for its row.

    Raises:
        ValueError: engine log-probs that are not one per token.
    """

    task_index: int
    prefix_ids: list[int]
    branches: list[Branch]
    head: int = 0

    def __post_init__(self) -> None:
        for branch in self.branches:
            known, tokens = branch.engine_logprobs, len(branch.ids)
            if known is not None and len(known) != tokens:
                raise ValueError(
                    f"task {self.task_index}: {len(known)} engine log-probs for a branch of {tokens} tokens"
                )


def group_from_json(record: dict[str, Any]) -> Group:
    """Inverse of `Group.to_json`."""
    fields = dict(record)
    fields["task"] = _task_from_json(fields["task"])
    fields["candidates"] = [Candidate(**candidate) for candidate in fields["candidates"]]
    if fields.get("pivot") is not None:
        fields["pivot"] = Candidate(**fields["pivot"])
    return Group(**fields)


def _task_from_json(record: dict[str, Any]) -> Task:
    if record.get("label") is None:  # nor has one that was recorded before there were labels
        return Task(**record)
    label = dict(record["label"])
    return Task(**record | {"label": _LABELS[label.pop("type")](**label)})


_LABELS: dict[str, type[Judgement] | type[Rewriting] | type[Thinking]] = {
    "Judgement": Judgement,
    "Rewriting": Rewriting,
    "Thinking": Thinking,
}
