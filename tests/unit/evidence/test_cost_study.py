"""evidence/cost.py and asking.py: what is asked, what is counted, and how selections compare with all pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_cases import small_place, understood
from fake_judge import FakeJudge
from hypothesis import given
from hypothesis import strategies as st
from judge_cases import make_group, make_settings

from evidence.asking import EVERYTHING, LIKELIHOOD, PAPER, PROTOCOLS, asked, settings, unjudged
from evidence.cost import STUDY, best_and_worst, parts, report_of, second_askings, selection
from evidence.numbers import share
from evidence.results import refuse_paths
from evidence.study import Place
from megatron_sip.judge.schedules import make_schedule, planned_pairs, votes_in_orders
from megatron_sip.records import Candidate

CALLS = {PAPER: 600, EVERYTHING: 240, "default, both orders": 96, "default": 48, "32 calls": 32, "suffix as pivot": 30}
"""A group of 16."""


@pytest.fixture(name="place")
def place_of(tmp_path: Path) -> Place:
    return small_place(tmp_path)


@pytest.mark.parametrize("quick", [False, True])
def test_commands_are_understood_by_their_programs(place: Place, quick: bool) -> None:
    made = parts(replace(place, quick=quick))
    programs = understood(made, place.smollm2, place.wiki_leads)
    assert programs == ["megatron_sip", *["evidence.asking"] * (len(PROTOCOLS) + 1)]
    record, *asking = made
    recorded = record.commands[0][record.commands[0].index("--save-groups") + 1]
    for part in asking:
        for words, result in zip(part.commands, part.results, strict=True):
            assert (words[3], words[-1]) == (recorded, str(result))
    assert len({path for part in asking for path in part.results}) == len(PROTOCOLS) + 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_group_of_sixteen_costs_as_many_calls(protocol: str) -> None:
    how = PROTOCOLS[protocol]
    soft = protocol != PAPER
    orders = 2 if how.both_orders else sum(votes_in_orders(make_schedule(how), 16, soft=soft, votes=5))
    assert planned_pairs(how, 16) * orders == CALLS[protocol]


async def test_scores_verdicts_and_cost_are_counted() -> None:
    """A perfect judge that writes its verdicts, one a pair."""
    groups = [make_group(index, [float(i) for i in range(5)]) for index in range(2)]
    async with FakeJudge() as server:
        found = await asked(groups, make_settings(server.url, call_timeout_s=10.0), None)
    assert found["scores"] == [[0.0, 0.25, 0.5, 0.75, 1.0]] * 2
    assert (found["calls"], found["prompt_tokens"], server.requests) == (20, 200, 20)
    assert [sorted({first, second}) for first, second, _ in found["verdicts"][0]].count([0, 1]) == 1
    assert found["kinds"][0] == ["suffix", *["rollout"] * 4]


def test_the_judge_is_asked_softly_but_for_the_paper_s_votes_and_never_audited() -> None:
    for protocol in (*PROTOCOLS, LIKELIHOOD):
        made = settings(protocol, "http://127.0.0.1:1", "model")
        [criterion] = made.criteria
        assert (made.mode(criterion), made.audit_rate) == ("hard" if protocol == PAPER else "soft", 0.0)
        assert (made.votes, made.temperature, made.top_p) == (5, 1.0, 0.6)
        assert (criterion == LIKELIHOOD) == (protocol == LIKELIHOOD)


def test_groups_are_asked_as_they_were_before_with_each_text_once() -> None:
    group = make_group(0, [0.1, 0.2, 0.3])
    twice = [*group.candidates, Candidate("rollout", [9], group.candidates[1].text)]
    [cleared] = unjudged([replace(group, candidates=twice, scores=[1.0] * 4, verdicts={"q": [[0, 1.0]]})])
    assert cleared == group


def answers(scores: Sequence[Sequence[float] | None], calls: int, verdicts: Any = None) -> dict[str, Any]:
    """As evidence/asking.py writes them."""
    kinds = [["suffix", *["rollout"] * (len(each) - 1)] if each else [] for each in scores]
    empty: list[list[float]] = [[] for _ in scores]
    return {"kinds": kinds, "scores": list(scores), "verdicts": verdicts or empty, "calls": calls * len(scores),
            "prompt_tokens": 100 * calls * len(scores), "seconds": 2.0 * len(scores), "counters": {"calls": calls}}  # fmt: skip


def certain(scores: Sequence[float]) -> list[list[float]]:
    """Verdicts of all ordered pairs by a judge without doubt."""
    count = range(len(scores))
    return [[i, j, float(scores[i] > scores[j])] for i in count for j in count if i != j]


def test_report_text_and_figure_are_what_the_answers_say(tmp_path: Path) -> None:
    truth = [[0.0, 0.5, 1.0], [1.0, 0.25, 0.0], [0.5, 1.0, 0.0]]
    found = {EVERYTHING: answers([*truth, [0.0, 1.0]], 6, [*map(certain, truth), certain([0.0, 1.0])])}
    found |= {name: answers([*truth, [0.0, 1.0]], 3) for name in PROTOCOLS if name != EVERYTHING}
    found[LIKELIHOOD] = answers([[1.0, 0.0, 0.5], [1.0, 0.25, 0.0], [0.5, 1.0, 0.0], None], 2)
    report = json.loads(json.dumps({"judge": share(0.95, 120), **report_of(found)}))
    refuse_paths(report, (str(tmp_path),))
    assert (report["groups"], report["left_out"], report["candidates"]) == (3, 1, [3, 3])
    default, likelihood = (report["protocols"][name] for name in ("default", LIKELIHOOD))
    assert (default["calls"], default["tokens"], default["seconds"]) == (3.0, 300, 2.0)
    assert default["recovered"]["value"] == 1.0
    assert likelihood["recovered"]["value"] == pytest.approx((-0.5 + 1 + 1) / 3, abs=1e-5)
    assert likelihood["same_best"]["value"] == pytest.approx(2 / 3, abs=1e-5)
    text = STUDY.section(report)
    assert f"| {PAPER} | 3 | 300 | 2.0 | 100 (100 to 100) | 100 (" in text
    assert "| default | 3 | 300 | 2.0 | 100 (100 to 100) |" in text
    assert "3 groups of 3 different texts" in text
    assert "is right about 95 (90 to 98) percent of held-out pairs" in " ".join(text.split())
    assert "1 more could not be judged under every protocol." in " ".join(text.split())
    STUDY.draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12, unique=True))
def test_a_protocol_that_says_the_same_recovers_everything(scores: list[float]) -> None:
    found = selection([np.array(scores)], [np.array(scores)])
    if max(scores) - min(scores) > 1e-6:
        assert found["recovered"]["value"] == 1.0
    assert found["same_best"]["value"] == found["same_worst"]["value"] == 1.0


def test_second_askings_are_told_with_what_failed() -> None:
    """Eight calls more than planned: of those that failed, or of answers in which no verdict was to be read."""
    assert second_askings({"calls": 240.0, "failed": {}}, 240) == ""
    assert "8.0 are second askings, of calls that failed (in all groups: timeout 192)" in second_askings(
        {"calls": 248.0, "failed": {"failed/timeout": 192.0}}, 240
    )
    assert "of calls without a verdict" in second_askings({"calls": 248.0, "failed": {}}, 240)


def test_ties_are_broken_by_lot() -> None:
    draws = np.random.default_rng(0)
    picked = {best_and_worst(np.zeros(4), draws) for _ in range(200)}
    assert len(picked) == 12
    assert {best_and_worst(np.array([0.0, 3.0, 1.0]), draws) for _ in range(5)} == {(1, 0)}
