"""Selection: every row of the paper's table 6, fair ties, nothing lost, no failure taught."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sip.experience.control import Control
from megatron_sip.experience.selection import (
    Objective,
    SelectionSettings,
    select,
    selection_metrics,
)
from megatron_sip.metrics import Mean, flatten, merge
from megatron_sip.records import CANDIDATE_KINDS, Candidate, CandidateKind, Group, Task


def candidate(kind: CandidateKind, *ids: int) -> Candidate:
    return Candidate(kind, list(ids), "", [-0.5] * len(ids) if kind == "rollout" else None)


def group(
    index: int, candidates: list[Candidate], scores: list[float] | None = None, dropped: str | None = None
) -> Group:
    return Group(Task(index, [1, 2, 3], [9, 9], "", ""), candidates, scores, dropped=dropped)


ABOUT_ONE_PROMPT = [
    candidate("suffix", 9, 9),
    candidate("rewrite", 8, 8),
    *(candidate("rollout", 10 + i, 7) for i in range(16)),
]


def picked(settings: SelectionSettings, g: Group) -> list[tuple[str, str, list[int]]]:
    (example,) = select([g], settings).examples
    return [(branch.role, branch.kind, branch.ids) for branch in example.branches]


# ---------------------------------------------------------------- the paper's table 6


def test_a_document_is_learnt_whole_behind_its_first_token() -> None:
    settings = SelectionSettings("sft", ("suffix",), sft_target="document")
    (example,) = select([group(4, [candidate("suffix", 9, 8)])], settings).examples
    assert (example.prefix_ids, [branch.ids for branch in example.branches]) == ([1], [[2, 3, 9, 8]])
    assert picked(settings, group(4, [candidate("suffix", 9, 8)])) == [("target", "suffix", [2, 3, 9, 8])]
    assert not settings.needs_judge


TABLE_6 = {
    "SFT (rewrite)": SelectionSettings("sft", ("rewrite",), sft_target="rewrite"),
    "SFT (1 rollout)": SelectionSettings("sft", ("rollout",), sft_target="rollout"),
    "Online DPO (chosen rewrite, rejected rollout)": SelectionSettings(
        "dpo", ("rewrite", "rollout"), fixed_roles=("rewrite", "rollout")
    ),
    "RF-NLL (rollout vs. rewrite)": SelectionSettings("rf-nll", ("rewrite", "rollout")),
    "RF-NLL (suffix vs. rewrite vs. 1 rollout)": SelectionSettings("rf-nll"),
    "Online DPO (suffix vs. 1 rollout)": SelectionSettings("dpo", ("suffix", "rollout")),
    "Online DPO (rewrite vs. 1 rollout)": SelectionSettings("dpo", ("rewrite", "rollout")),
    "Online DPO (suffix vs. 16 rollouts)": SelectionSettings("dpo", ("suffix", "rollout")),
    "Online DPO (suffix vs. rewrite vs. 16 rollouts)": SelectionSettings("dpo"),
    "Online DPO (suffix as a pivot for 16 rollouts)": SelectionSettings("dpo", ("rollout",)),
    "Online DPO (16 rollouts)": SelectionSettings("dpo", ("rollout",)),
}


@pytest.mark.parametrize("row", TABLE_6)
def test_every_row_of_table_6(row: str) -> None:
    settings = TABLE_6[row]
    scores = [5.0, 9.0, *(float(i) / 4 for i in range(16))]  # rewrite best, the suffix next, rollout 0 worst
    judged = group(4, ABOUT_ONE_PROMPT, scores if settings.needs_judge else None)
    branches = picked(settings, judged)
    kinds = {kind: ids for _, kind, ids in branches}
    assert set(kinds) <= set(settings.candidates)
    if settings.objective == "dpo":
        (chosen, first, _), (rejected, last, _) = branches
        assert (chosen, rejected, last) == ("chosen", "rejected", "rollout")
        expected_first = next(kind for kind in ("rewrite", "suffix", "rollout") if kind in settings.candidates)
        assert first == expected_first
        if settings.needs_judge:
            assert branches[1][2] == [10, 7]
    else:
        ((role, kind, _),) = branches
        assert role == "target"
        assert kind == (settings.sft_target if settings.objective == "sft" else "rewrite")
    assert settings.needs_judge == (not row.startswith("SFT") and "chosen" not in row)


def test_the_example_carries_what_training_needs() -> None:
    (example,) = select([group(4, ABOUT_ONE_PROMPT[:3], [1.0, 0.5, 0.0])], SelectionSettings("dpo")).examples
    assert (example.task_index, example.prefix_ids) == (4, [1, 2, 3])
    assert [branch.ids for branch in example.branches] == [[9, 9], [10, 7]]
    assert [branch.engine_logprobs for branch in example.branches] == [None, [-0.5, -0.5]]


# ---------------------------------------------------------------- reasons

GOOD = [candidate("suffix", 1), candidate("rollout", 2)]


@pytest.mark.parametrize(
    ("settings", "made", "reason"),
    [
        (SelectionSettings("dpo"), group(0, GOOD, None, dropped="vote quorum"), "vote quorum"),
        (SelectionSettings("sft"), group(0, GOOD, None, dropped="rollout failed"), "rollout failed"),
        (SelectionSettings("dpo"), group(0, GOOD), "unscored"),
        (SelectionSettings("rf-nll"), group(0, GOOD), "unscored"),
        (SelectionSettings("dpo"), group(0, GOOD, [1.0, math.nan]), "non-finite score"),
        (SelectionSettings("dpo"), group(0, GOOD, [math.inf, 0.0]), "non-finite score"),
        (SelectionSettings("dpo"), group(0, GOOD, [0.3, 0.1 + 0.2]), "tied"),
        (SelectionSettings("dpo"), group(0, [GOOD[0], candidate("rollout", 1)], [0.0, 1.0]), "identical"),
        (SelectionSettings("dpo"), group(0, [GOOD[0], candidate("rollout")], [0.0, 1.0]), "fewer than two candidates"),
        (SelectionSettings("dpo", ("suffix",)), group(0, GOOD, [0.0, 1.0]), "fewer than two candidates"),
        (SelectionSettings("rf-nll", ("rewrite",)), group(0, GOOD, [0.0, 1.0]), "no candidate"),
        (SelectionSettings("rf-nll", ("rewrite", "rollout")), group(0, GOOD, [0.0, 1.0]), "lone rollout"),
        (SelectionSettings("rf-nll"), group(0, [candidate("rollout", 2)] * 3, [1.0] * 3), "lone rollout"),
        (
            SelectionSettings("rf-nll", ("rollout",)),
            group(0, [candidate("rollout", 1), candidate("rollout", 2)], [0.0, 0.0]),
            "tied",
        ),
        (SelectionSettings("sft", sft_target="rewrite"), group(0, GOOD), "no rewrite"),
        (SelectionSettings("dpo", fixed_roles=("rewrite", "rollout")), group(0, GOOD), "no rewrite"),
        (SelectionSettings("dpo", fixed_roles=("suffix", "rewrite")), group(0, GOOD), "no rewrite"),
        (
            SelectionSettings("dpo", fixed_roles=("rewrite", "rollout")),
            group(0, [candidate("rewrite", 5), candidate("rollout", 5)]),
            "identical",
        ),
        (
            SelectionSettings("dpo"),
            dataclasses.replace(group(0, GOOD, [0, 1]), task=Task(0, [], [1], "", "")),
            "empty prefix",
        ),
    ],
)
def test_reasons(settings: SelectionSettings, made: Group, reason: str) -> None:
    selected = select([made], settings)
    assert selected.examples == []
    assert selected.dropped == {reason: 1}


def test_fixed_roles_find_a_rollout_that_differs() -> None:
    made = group(0, [candidate("rewrite", 5), *(candidate("rollout", 5) for _ in range(9)), candidate("rollout", 6)])
    settings = SelectionSettings("dpo", ("rewrite", "rollout"), fixed_roles=("rewrite", "rollout"))
    assert picked(settings, made) == [("chosen", "rewrite", [5]), ("rejected", "rollout", [6])]


def test_missing_scores_are_a_bug_not_a_low_score() -> None:
    with pytest.raises(ValueError, match="task 3: 1 scores for 2 candidates"):
        select([group(3, GOOD, [1.0])], SelectionSettings("dpo"))


@pytest.mark.parametrize("kind", ["suffix", "rewrite"])
def test_rf_nll_learns_a_lone_text_that_the_policy_did_not_write(kind: CandidateKind) -> None:
    settings = SelectionSettings("rf-nll", (kind, "rollout"))
    assert picked(settings, group(0, [candidate(kind, 5)], [0.0])) == [("target", kind, [5])]


def test_rf_nll_learns_no_suffix_whose_rewrite_is_missing_but_one_that_was_copied() -> None:
    settings = SelectionSettings("rf-nll", ("suffix", "rewrite"))
    assert select([group(0, [candidate("suffix", 5)], [0.0])], settings).dropped == {"lone suffix": 1}
    copied = group(0, [candidate("suffix", 5), candidate("rewrite", 5)], [0.0, 0.0])
    assert picked(settings, copied) == [("target", "suffix", [5])]


def test_the_chosen_candidate_is_never_the_rejected_one() -> None:
    """Scores within rounding of the best and of the worst alike: such a candidate is one of the worst."""
    rollouts = [candidate("rollout", i) for i in range(3)]
    made = [group(i, rollouts, [0.0, 0.9e-9, 1.8e-9]) for i in range(200)]
    for example in select(made, SelectionSettings("dpo")).examples:
        assert example.branches[0].ids == [2]
        assert example.branches[1].ids in ([0], [1])


def test_rf_nll_draws_among_equals_instead_of_dropping() -> None:
    made = [group(i, GOOD, [0.5, 0.5]) for i in range(400)]
    selected = select(made, SelectionSettings("rf-nll"))
    assert len(selected.examples) == 400
    assert 150 < selected.chosen_kinds["rollout"] < 250


def test_identical_candidates_compete_once_with_their_mean_score() -> None:
    made = group(0, [*GOOD, candidate("rollout", 1), candidate("rewrite", 3)], [1.0, 0.2, 0.0, 0.4])
    selected = select([made], SelectionSettings("dpo"))
    assert selected.merged == 1
    assert [branch.ids for branch in selected.examples[0].branches] == [[1], [2]]  # (1.0 + 0.0) / 2 still beats 0.4
    assert [branch.kind for branch in selected.examples[0].branches] == ["suffix", "rollout"]
    assert selected.score_gaps == [pytest.approx(0.3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ppo"}, "--objective must be sft, rf-nll, dpo or grpo, got 'ppo'"),
        ({"candidates": ()}, "--candidates must be distinct kinds"),
        ({"candidates": ("suffix", "suffix")}, "--candidates must be distinct kinds"),
        ({"candidates": ("human",)}, "--candidates must be distinct kinds"),
        ({"objective": "sft", "candidates": ("rewrite",)}, "--sft-target suffix is not among"),
        ({"objective": "sft", "candidates": ("rewrite",), "sft_target": "document"}, "--sft-target document is not"),
        ({"objective": "sft", "fixed_roles": ("suffix", "rollout")}, "--dpo-pair is for --objective dpo"),
        ({"control": Control("safety", "a", "b")}, "--control-token is for --objective rf-nll"),
        ({"fixed_roles": ("rollout", "rollout")}, "must be two different kinds"),
        ({"fixed_roles": ("rewrite", "rollout"), "candidates": ("rollout",)}, "must be two different kinds among"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionSettings(**changes)


# ---------------------------------------------------------------- properties

scores_with_ties = st.sampled_from([0.0, 0.25, 0.5, 1.0])
any_score = st.one_of(scores_with_ties, st.sampled_from([math.nan, math.inf, -math.inf]))
candidates = st.builds(
    lambda kind, ids: candidate(kind, *ids), st.sampled_from(CANDIDATE_KINDS), st.lists(st.integers(0, 3), max_size=2)
)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    entries = draw(st.lists(candidates, max_size=7))
    scores = [draw(any_score) for _ in entries]
    dropped = draw(st.sampled_from([None, None, None, "judge timed out"]))
    made = group(draw(st.integers(0, 1000)), entries, scores if draw(st.integers(0, 4)) else None, dropped)
    return dataclasses.replace(
        made, task=dataclasses.replace(made.task, prefix_ids=draw(st.sampled_from([[1], [1, 2], []])))
    )


any_settings = st.sampled_from(
    [
        *TABLE_6.values(),
        SelectionSettings("sft"),
        SelectionSettings("dpo", ("suffix", "rewrite", "rollout"), fixed_roles=("suffix", "rollout")),
    ]
)


@given(st.lists(groups(), max_size=12), any_settings)
def test_every_group_is_an_example_or_counted_and_no_failure_is_taught(made: list[Group], settings) -> None:
    selected = select(made, settings)
    assert len(made) == len(selected.examples) + selected.dropped.total()
    assert selected.chosen_kinds.total() == len(selected.examples)
    remaining = iter(made)
    for example in selected.examples:
        origin = next(g for g in remaining if _could_give(g, example, settings))  # in the order of the groups
        assert origin.dropped is None
        assert example.prefix_ids
        assert all(branch.ids for branch in example.branches)
        assert len({tuple(branch.ids) for branch in example.branches}) == len(example.branches)
        if settings.needs_judge:
            assert origin.scores is not None
    assert all(math.isfinite(gap) and gap > 0 for gap in selected.score_gaps)
    for metric in selection_metrics(made, selected).values():
        assert isinstance(metric, Mean)
        assert math.isfinite(metric.total)
        assert metric.weight >= 0


def _could_give(g: Group, example, settings: SelectionSettings) -> bool:
    offered = {tuple(c.ids) for c in g.candidates if c.kind in settings.candidates}
    same_task = (g.task.index, g.task.prefix_ids) == (example.task_index, example.prefix_ids)
    return same_task and g.dropped is None and {tuple(branch.ids) for branch in example.branches} <= offered


@given(groups(), any_settings, st.randoms(use_true_random=False))
def test_the_order_of_candidates_decides_nothing(made: Group, settings, random) -> None:
    order = list(range(len(made.candidates)))
    random.shuffle(order)
    shuffled = dataclasses.replace(
        made,
        candidates=[made.candidates[i] for i in order],
        scores=None if made.scores is None else [made.scores[i] for i in order],
    )
    assert select([made], settings) == select([shuffled], settings)


@given(groups(), st.sampled_from([s for s in TABLE_6.values() if s.needs_judge]))
def test_the_best_is_chosen_and_the_worst_rejected(made: Group, settings) -> None:
    selected = select([made], settings)
    if not selected.examples:
        return
    assert made.scores is not None
    by_ids: dict[tuple[int, ...], list[float]] = {}
    for c, score in zip(made.candidates, made.scores, strict=True):
        if c.kind in settings.candidates and c.ids:
            by_ids.setdefault(tuple(c.ids), []).append(score)
    means = {ids: sum(values) / len(values) for ids, values in by_ids.items()}
    (example,) = selected.examples
    assert means[tuple(example.branches[0].ids)] == pytest.approx(max(means.values()))
    if settings.objective == "dpo":
        assert means[tuple(example.branches[1].ids)] == pytest.approx(min(means.values()))


@pytest.mark.parametrize("objective", ["dpo", "rf-nll"])
def test_ties_are_broken_evenly_and_by_seed(objective: Objective) -> None:
    rollouts = [candidate("rollout", i) for i in range(4)]
    made = [group(i, [*rollouts, candidate("suffix", 9)], [1.0, 1.0, 1.0, 0.0, 0.0]) for i in range(3000)]
    first = select(made, SelectionSettings(objective, seed=1))
    chosen = Counter(example.branches[0].ids[0] for example in first.examples)
    assert sorted(chosen) == [0, 1, 2]
    assert all(900 < count < 1100 for count in chosen.values())  # 1000 expected, 4 standard deviations
    if objective == "dpo":
        assert 1390 < first.rejected_kinds["suffix"] < 1610
        joint = Counter(
            (e.branches[0].ids[0], e.branches[1].ids[0]) for e in first.examples
        )  # the two draws are independent
        assert all(400 < count < 600 for count in joint.values())
    assert select(made, SelectionSettings(objective, seed=1)) == first
    assert select(made, SelectionSettings(objective, seed=2)).examples != first.examples


# ---------------------------------------------------------------- metrics


def test_metrics_by_hand() -> None:
    made = [
        group(0, [candidate("suffix", 1), candidate("rollout", 2), candidate("rollout", 3)], [0.5, 1.0, 0.0]),
        group(1, [candidate("suffix", 1), candidate("rollout", 2)], [1.0, 1.0]),
        group(2, GOOD, None, dropped="judge timed out"),
    ]
    selected = select(made, SelectionSettings("dpo"))
    assert flatten(selection_metrics(made, selected)) == {
        "score/suffix": 0.75,
        "score/rollout": pytest.approx(2 / 3),
        "win_rate/suffix": 0.5,  # one won, one lost, one tie
        "win_rate/rollout": 0.5,
        "chosen_rate/suffix": 0.0,
        "chosen_rate/rollout": 1.0,
        "chosen_chance/suffix": pytest.approx(1 / 3),
        "chosen_chance/rollout": pytest.approx(2 / 3),
        "rejected_rate/suffix": 0.0,
        "rejected_rate/rollout": 1.0,
        "score_gap": 1.0,
        "dropped_rate": pytest.approx(2 / 3),
    }


def test_the_chance_of_being_chosen_is_that_of_a_random_choice() -> None:
    rollouts = [candidate("rollout", 20 + k) for k in range(16)]
    made = [
        group(
            i, [candidate("suffix", 1), *rollouts[: 1 + i % 4]], [((i * 7 + k * k) % 11) / 11 for k in range(2 + i % 4)]
        )
        for i in range(400)
    ]
    metrics = flatten(selection_metrics(made, select(made, SelectionSettings("rf-nll"))))
    assert metrics["chosen_chance/rollout"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4)
    assert metrics["chosen_chance/suffix"] + metrics["chosen_chance/rollout"] == pytest.approx(1)
    assert not any("rewrite" in name or "rejected" in name for name in metrics)  # no such candidates, no such roles


def test_rates_of_a_kind_are_over_the_examples_in_which_it_competed() -> None:
    """A refused rewrite is no rewrite that lost."""
    made = [
        group(0, [candidate("rewrite", 1), candidate("rollout", 2)], [1.0, 0.0]),
        group(1, [candidate("rollout", 3), candidate("rollout", 4)], [1.0, 0.0]),
    ]
    metrics = flatten(selection_metrics(made, select(made, SelectionSettings("dpo"))))
    assert (metrics["chosen_rate/rewrite"], metrics["chosen_rate/rollout"]) == (1.0, 0.5)
    assert (metrics["rejected_rate/rewrite"], metrics["rejected_rate/rollout"]) == (0.0, 1.0)
    assert metrics["chosen_chance/rewrite"] == 0.5


def test_the_spread_of_each_criterion_is_logged() -> None:
    made = [
        dataclasses.replace(group(0, GOOD, [1.4, 0.6]), criterion_scores={"quality": [0.9, 0.1], "safety": [0.5, 0.5]}),
        dataclasses.replace(group(1, GOOD, [0.6, 0.6]), criterion_scores={"quality": [0.4, 0.6], "safety": [0.2, 0.0]}),
        dataclasses.replace(group(2, GOOD, None, dropped="judge timed out"), criterion_scores={}),
    ]
    metrics = flatten(selection_metrics(made, select(made, SelectionSettings("dpo"))))
    assert metrics["spread/quality"] == pytest.approx((0.8 + 0.2) / 2)
    assert metrics["spread/safety"] == pytest.approx(0.1)


@given(st.lists(groups(), max_size=8), st.integers(0, 8), any_settings)
def test_metrics_add_over_ranks(made: list[Group], cut: int, settings) -> None:
    parts = [selection_metrics(part, select(part, settings)) for part in (made[:cut], made[cut:])]
    whole = selection_metrics(made, select(made, settings))
    together = merge(parts)
    assert list(together) == list(whole) == list(parts[0])
    assert flatten(together) == pytest.approx(flatten(whole))
    assert all(math.isfinite(mean) for mean in flatten(whole).values())
