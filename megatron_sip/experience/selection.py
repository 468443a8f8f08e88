"""Turn judged groups into training examples (paper section 2.3 and table 6). Pure Python: no torch, no servers.

A group either becomes exactly one example or is dropped for a named reason: len(groups) == len(examples) + dropped. Only
with control texts (`experience/control.py`) it may become two.
A missing score is never read as a low one, and the order in which candidates are listed decides nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from megatron_sip.experience.advantages import NO_SPREAD, TIE_TOLERANCE, Truncated, sampled_branches
from megatron_sip.experience.control import Control, ControlIds
from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import CANDIDATE_KINDS, Branch, Candidate, CandidateKind, Example, Group, Role

Objective = Literal["sft", "rf-nll", "dpo", "grpo"]
SftTarget = CandidateKind | Literal["document"]

UNSCORED, NON_FINITE, TIED, IDENTICAL = "unscored", "non-finite score", "tied", "identical"
NO_CANDIDATE, TOO_FEW, EMPTY_PREFIX = "no candidate", "fewer than two candidates", "empty prefix"
LONE_ROLLOUT = "lone rollout"
"""RF-NLL without a competitor would teach the policy whatever it wrote, an unsafe rollout whose rewrite was refused too."""
LONE_SUFFIX = "lone suffix"
"""A rewrite of it was asked for, and refused or lost: it may be one that needs it."""
ALL_ALIKE = frozenset({NO_SPREAD, TIED, IDENTICAL})
"""Reasons of groups that are whole and judged, and in which no candidate is better than another."""


@dataclass(frozen=True, slots=True)
class SelectionSettings:
    """Which candidates compete, and what the winner (and loser) is trained as. Raises ValueError when inconsistent.

    sft: the candidate of kind `sft_target`; needs no judge. Of "document" every token of prefix and suffix but the first.
    rf-nll: the candidate with the highest score; a rollout has to win against another candidate. With `control` the best of
    the good candidates and the worst of the bad ones, if there are, each behind its control text.
    dpo: highest score as chosen, lowest as rejected; with `fixed_roles` = (chosen kind, rejected kind) without a judge.
    grpo: all rollouts, with their advantages; `truncated` says what becomes of those cut at their limit, and
    `spread_normalization` divides advantages by the group's spread. Other kinds are only compared with.
    `candidates` are the kinds that compete; other candidates of a group are ignored.
    Draws among ties, or among several candidates of a fixed kind, depend on `seed`, the task and the candidate only.
    """

    objective: Objective = "dpo"
    candidates: tuple[CandidateKind, ...] = CANDIDATE_KINDS
    sft_target: SftTarget = "suffix"
    fixed_roles: tuple[CandidateKind, CandidateKind] | None = None
    seed: int = 1234
    control: Control | None = None
    truncated: Truncated = "score"
    spread_normalization: bool = False

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(f"--objective must be sft, rf-nll, dpo or grpo, got {self.objective!r}")
        unknown = [kind for kind in self.candidates if kind not in CANDIDATE_KINDS]
        if unknown or not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise ValueError(f"--candidates must be distinct kinds of {CANDIDATE_KINDS}, got {self.candidates}")
        if self.objective == "sft" and self.sft_kind not in self.candidates:
            raise ValueError(f"--sft-target {self.sft_target} is not among --candidates {self.candidates}; add it")
        if self.control is not None and self.objective != "rf-nll":
            raise ValueError(f"--control-token is for --objective rf-nll, got {self.objective}")
        if self.objective == "grpo" and "rollout" not in self.candidates:
            raise ValueError(f"--objective grpo learns from rollouts: add rollout to --candidates {self.candidates}")
        if self.truncated not in get_args(Truncated):
            raise ValueError(f"--truncated-answers must be score, mask or zero, got {self.truncated!r}")
        if self.fixed_roles is None:
            return
        if self.objective != "dpo":
            raise ValueError(f"--dpo-pair is for --objective dpo, got {self.objective}")
        if len(set(self.fixed_roles)) != 2 or not set(self.fixed_roles) <= set(self.candidates):
            raise ValueError(f"--dpo-pair {self.fixed_roles} must be two different kinds among {self.candidates}")

    @property
    def sft_kind(self) -> CandidateKind:
        """The kind of candidate that SFT learns; a document is its prefix and its suffix."""
        return "suffix" if self.sft_target == "document" else self.sft_target

    @property
    def needs_judge(self) -> bool:
        """Whether groups must carry scores."""
        return self.objective != "sft" and self.fixed_roles is None


@dataclass(frozen=True, slots=True)
class Selected:
    """The examples of one step in the order of their groups, and what became of the other groups.

    `merged` counts candidates with the same token ids as another one of their group, `empty` those without a token;
    both were set aside, not their groups. `score_gaps` is chosen minus rejected score, one per judged DPO example.
    `offered_kinds` counts the examples for which a candidate of that kind competed, and `chances` adds up how likely a
    random contender of them is of that kind (judged groups only): what a judge that tosses coins would choose.
    `controlled`: groups learnt behind control texts, "both" a good and a bad candidate, or the "good" one alone.
    """

    examples: list[Example]
    dropped: Counter[str] = field(default_factory=Counter)
    chosen_kinds: Counter[CandidateKind] = field(default_factory=Counter)
    rejected_kinds: Counter[CandidateKind] = field(default_factory=Counter)
    offered_kinds: Counter[CandidateKind] = field(default_factory=Counter)
    chances: dict[CandidateKind, float] = field(default_factory=dict)
    score_gaps: list[float] = field(default_factory=list)
    merged: int = 0
    empty: int = 0
    controlled: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Contender:
    """A distinct completion of a group; `score` is the mean over its identical candidates, None without a judge."""

    candidate: Candidate
    score: float | None


@dataclass(frozen=True, slots=True)
class _Choice:
    """The branches of a group's example by role, the first one being trained towards.

    controlled: each is an example of its own, the first behind the good control text, the second behind the bad one.
    """

    roles: list[Role]
    contenders: list[_Contender]
    controlled: bool = False


def select(groups: Sequence[Group], settings: SelectionSettings, control_ids: ControlIds | None = None) -> Selected:
    """One example for every usable group, a counted reason for every other; `control_ids` where the settings have control.

    Raises ValueError if a group has not as many scores as candidates (a bug of the judge's, not bad luck).
    """
    selected = Selected([])
    merged = empty = 0
    for group in groups:
        entrants = [i for i, c in enumerate(group.candidates) if c.kind in settings.candidates]
        usable = [i for i in entrants if group.candidates[i].ids]
        reason = _unusable(group, usable, settings)
        if reason is not None:
            selected.dropped[reason] += 1
            continue
        empty += len(entrants) - len(usable)
        if settings.objective == "grpo":
            branches = sampled_branches(group, settings.truncated, by_spread=settings.spread_normalization)
            if isinstance(branches, str):
                selected.dropped[branches] += 1
            else:
                selected.examples.append(Example(group.task.index, group.task.prefix_ids, branches))
            continue
        contenders = _merge_identical(group, usable, settings.needs_judge)
        merged += len(usable) - len(contenders)
        choice = _choose(group, usable, contenders, settings)
        if isinstance(choice, str):
            selected.dropped[choice] += 1
            continue
        _add(selected, group, choice, settings, control_ids)
        _count_offered(selected, [group.candidates[i].kind for i in usable], contenders, settings)
    return replace(selected, merged=merged, empty=empty)


def _unusable(group: Group, usable: Sequence[int], settings: SelectionSettings) -> str | None:
    if group.dropped is not None:
        return group.dropped
    if not group.task.prefix_ids:
        return EMPTY_PREFIX
    if settings.needs_judge:
        if group.scores is None:
            return UNSCORED
        if len(group.scores) != len(group.candidates):
            raise ValueError(
                f"task {group.task.index}: {len(group.scores)} scores for {len(group.candidates)} candidates; "
                "the judge must give one per candidate"
            )
        if not all(math.isfinite(group.scores[i]) for i in usable):
            return NON_FINITE
    return None


def _merge_identical(group: Group, usable: Sequence[int], scored: bool) -> list[_Contender]:
    """Candidates with equal ids are one completion: its score is their mean, its kind the first in CANDIDATE_KINDS."""
    same: dict[tuple[int, ...], list[int]] = {}
    for i in usable:
        same.setdefault(tuple(group.candidates[i].ids), []).append(i)
    contenders = []
    for indices in same.values():
        scores = [group.scores[i] for i in indices] if scored and group.scores is not None else None
        representative = min((group.candidates[i] for i in indices), key=_representative_order)
        contenders.append(_Contender(representative, math.fsum(scores) / len(scores) if scores else None))
    return contenders


def _representative_order(candidate: Candidate) -> tuple[int, bool, tuple[float, ...]]:
    return CANDIDATE_KINDS.index(candidate.kind), candidate.logprobs is None, tuple(candidate.logprobs or ())


def _choose(
    group: Group, usable: Sequence[int], contenders: list[_Contender], settings: SelectionSettings
) -> _Choice | str:
    """The branches of the group's example, or the reason why there is none."""
    if settings.objective == "sft":
        target = _draw_of_kind(group, usable, settings.sft_kind, settings, "target")
        return f"no {settings.sft_kind}" if target is None else _Choice(["target"], [target])
    if settings.fixed_roles is not None:
        return _fixed_pair(group, usable, settings.fixed_roles, settings)
    if not contenders:
        return NO_CANDIDATE
    scores = [_score(contender) for contender in contenders]
    best = _highest(contenders)
    if settings.objective == "rf-nll":
        if len(contenders) == 1 and contenders[0].candidate.kind == "rollout":
            return LONE_ROLLOUT
        was_rewritten = any(group.candidates[i].kind == "rewrite" for i in usable)  # into itself, then the two are one
        if len(contenders) == 1 and "rewrite" in settings.candidates and not was_rewritten:
            return LONE_SUFFIX
        if settings.control is not None:
            return _controlled(group, usable, contenders, settings, settings.control)
        if max(scores) - min(scores) <= TIE_TOLERANCE and all(c.candidate.kind == "rollout" for c in contenders):
            return TIED  # none of them has won; they may all be wrong
        return _Choice(["target"], [_draw(group, best, settings, "target")])
    if len(usable) < 2:
        return TOO_FEW
    if len(contenders) < 2:
        return IDENTICAL
    if max(scores) - min(scores) <= TIE_TOLERANCE:
        return TIED
    worst = [c for c, s in zip(contenders, scores, strict=True) if s <= min(scores) + TIE_TOLERANCE]
    best = [c for c in best if c not in worst]  # one between the two, within rounding of both, is no best one
    pair = [_draw(group, best, settings, "chosen"), _draw(group, worst, settings, "rejected")]
    return _Choice(["chosen", "rejected"], pair)


def _controlled(
    group: Group, usable: Sequence[int], contenders: list[_Contender], settings: SelectionSettings, control: Control
) -> _Choice | str:
    """The best of the good candidates, and the worst of the bad ones: of equally bad ones the best by all criteria.

    What is learnt behind the bad text is then what the criterion tells, not bad writing. Without a good one the group is of
    no use: there is nothing to be told from the bad.
    """
    scores = group.criterion_scores.get(control.criterion)
    if scores is None:
        return f"no {control.criterion} scores"
    same: dict[tuple[int, ...], list[float]] = {}
    for i in usable:
        same.setdefault(tuple(group.candidates[i].ids), []).append(scores[i])
    own = {ids: math.fsum(found) / len(found) for ids, found in same.items()}
    good = [c for c in contenders if own[tuple(c.candidate.ids)] >= control.threshold]
    bad = [c for c in contenders if own[tuple(c.candidate.ids)] < control.threshold]
    if not good:
        return "no good candidate"
    chosen = _draw(group, _highest(good), settings, "target")
    if not bad:
        return _Choice(["target"], [chosen], controlled=True)
    lowest = min(own[tuple(c.candidate.ids)] for c in bad)
    worst = [c for c in bad if own[tuple(c.candidate.ids)] <= lowest + TIE_TOLERANCE]
    return _Choice(["target", "target"], [chosen, _draw(group, _highest(worst), settings, "target")], controlled=True)


def _highest(contenders: Sequence[_Contender]) -> list[_Contender]:
    """Those of the highest score over all criteria."""
    highest = max(map(_score, contenders))
    return [c for c in contenders if _score(c) >= highest - TIE_TOLERANCE]


def _fixed_pair(
    group: Group, usable: Sequence[int], kinds: tuple[CandidateKind, CandidateKind], settings: SelectionSettings
) -> _Choice | str:
    """DPO without a judge. Both kinds are looked up unmerged: a rewrite that equals the suffix is still a rewrite."""
    chosen = _draw_of_kind(group, usable, kinds[0], settings, "chosen")
    if chosen is None:
        return f"no {kinds[0]}"
    if not any(group.candidates[i].kind == kinds[1] for i in usable):
        return f"no {kinds[1]}"
    different = [i for i in usable if group.candidates[i].ids != chosen.candidate.ids]
    rejected = _draw_of_kind(group, different, kinds[1], settings, "rejected")
    return IDENTICAL if rejected is None else _Choice(["chosen", "rejected"], [chosen, rejected])


def _draw_of_kind(
    group: Group, usable: Sequence[int], kind: CandidateKind, settings: SelectionSettings, role: Role
) -> _Contender | None:
    of_kind = [_Contender(group.candidates[i], None) for i in usable if group.candidates[i].kind == kind]
    return _draw(group, of_kind, settings, role) if of_kind else None


def _draw(group: Group, contenders: Sequence[_Contender], settings: SelectionSettings, role: Role) -> _Contender:
    """A seeded draw that looks at the candidates' content, so that it is the same in whatever order they are listed."""
    return max(contenders, key=lambda c: _ticket(settings.seed, group.task.index, role, c.candidate))


def _ticket(seed: int, task_index: int, role: Role, candidate: Candidate) -> bytes:
    content = f"{seed}|{task_index}|{role}|{candidate.kind}|{candidate.ids}"
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _score(contender: _Contender) -> float:
    assert contender.score is not None, "only judged groups are compared"
    return contender.score


def _add(
    selected: Selected, group: Group, choice: _Choice, settings: SelectionSettings, control_ids: ControlIds | None
) -> None:
    candidates = [contender.candidate for contender in choice.contenders]
    if choice.controlled:
        assert control_ids is not None, "control texts have ids where there is a tokenizer"
        selected.examples.extend(_behind_control(group, candidates, control_ids))
        selected.controlled["both" if len(candidates) == 2 else "good"] += 1
    else:
        selected.examples.append(_example(group, candidates, choice.roles, settings))
    selected.chosen_kinds[candidates[0].kind] += 1
    if len(candidates) == 2 and not choice.controlled:
        selected.rejected_kinds[candidates[1].kind] += 1
        if choice.contenders[0].score is not None:
            selected.score_gaps.append(_score(choice.contenders[0]) - _score(choice.contenders[1]))


def _example(
    group: Group, candidates: Sequence[Candidate], roles: Sequence[Role], settings: SelectionSettings
) -> Example:
    prefix = group.task.prefix_ids
    if settings.objective == "sft" and settings.sft_target == "document":
        [suffix] = candidates
        return Example(group.task.index, prefix[:1], [Branch([*prefix[1:], *suffix.ids], "target", "suffix")])
    branches = [
        Branch(candidate.ids, role, candidate.kind, engine_logprobs=candidate.logprobs)
        for candidate, role in zip(candidates, roles, strict=True)
    ]
    return Example(group.task.index, prefix, branches)


def _behind_control(group: Group, candidates: Sequence[Candidate], control_ids: ControlIds) -> list[Example]:
    """An example each, the first good; what the engine thought of a rollout was without the control text."""
    examples = []
    for good, candidate in zip((True, False), candidates, strict=False):
        prefix, head = control_ids.before(group.task.prefix_ids, good=good)
        branch = Branch(candidate.ids, "target", candidate.kind)
        examples.append(Example(group.task.index, prefix, [branch], head=head))
    return examples


def _count_offered(
    selected: Selected, usable: Sequence[CandidateKind], contenders: Sequence[_Contender], settings: SelectionSettings
) -> None:
    for kind in set(usable):
        selected.offered_kinds[kind] += 1
        if settings.needs_judge:
            own = sum(contender.candidate.kind == kind for contender in contenders)
            selected.chances[kind] = selected.chances.get(kind, 0.0) + own / len(contenders)


def selection_metrics(groups: Sequence[Group], selected: Selected) -> Metrics:
    """What a step's log shows of judging and selection; a rate of a kind that no group had is without weight.

    score/KIND: mean score. win_rate/KIND: share of comparisons with candidates of other kinds of the same group that it
    wins, ties half. chosen_rate/KIND, rejected_rate/KIND: share of the examples for which such a candidate competed
    (rollout: the paper's figure 8); chosen_chance/KIND: what the former is when the choice is random, K/(K+1) for K
    rollouts against a suffix. score_gap: chosen minus rejected. spread/CRITERION: highest minus lowest score of a group; a
    criterion whose spread is small decides little, whatever its weight. dropped_rate: share of groups without an example.
    control_pairs: of the groups learnt behind control texts, the share that had a bad candidate beside the good one.
    """
    sums: dict[str, tuple[float, int]] = {}
    scored = [g for g in groups if g.scores is not None and g.dropped is None and all(map(math.isfinite, g.scores))]
    pairs = selected.rejected_kinds.total()
    for kind in CANDIDATE_KINDS:
        scores = [s for g in scored for c, s in zip(g.candidates, g.scores or (), strict=True) if c.kind == kind]
        sums[f"score/{kind}"] = (math.fsum(scores), len(scores))
        wins = [_wins(g, kind) for g in scored]
        sums[f"win_rate/{kind}"] = (sum(w for w, _ in wins), sum(n for _, n in wins))
        offered = selected.offered_kinds[kind]
        sums[f"chosen_rate/{kind}"] = (selected.chosen_kinds[kind], offered)
        sums[f"chosen_chance/{kind}"] = (selected.chances.get(kind, 0.0), offered if kind in selected.chances else 0)
        sums[f"rejected_rate/{kind}"] = (selected.rejected_kinds[kind], offered if pairs else 0)
    sums["score_gap"] = (math.fsum(selected.score_gaps), len(selected.score_gaps))
    for criterion in sorted({name for g in scored for name in g.criterion_scores}):
        own = [g.criterion_scores[criterion] for g in scored if criterion in g.criterion_scores]
        spreads = [max(scores) - min(scores) for scores in own if scores]
        sums[f"spread/{criterion}"] = (math.fsum(spreads), len(spreads))
    sums["control_pairs"] = (selected.controlled["both"], selected.controlled.total())
    sums["dropped_rate"] = (selected.dropped.total(), len(groups))
    return {name: Mean(total, count) for name, (total, count) in sums.items()}


def _wins(group: Group, kind: CandidateKind) -> tuple[float, int]:
    """(comparisons won by `kind` against other kinds, comparisons)."""
    scores = list(zip(group.candidates, group.scores or (), strict=True))
    own = [score for candidate, score in scores if candidate.kind == kind]
    others = [score for candidate, score in scores if candidate.kind != kind]
    gaps = [a - b for a in own for b in others]
    return sum(0.5 if abs(gap) <= TIE_TOLERANCE else float(gap > 0) for gap in gaps), len(gaps)
