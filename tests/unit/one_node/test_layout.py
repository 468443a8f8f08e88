"""How GPUs are divided: by hand for the usual nodes, by property for all."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_sip.one_node.layout import Demand, Layout, LayoutError, plan_layout
from megatron_sip.plan import plan

H100 = 80 * 10**9
SMALL = Demand(policy_bytes=270 * 10**6, teacher_bytes=2 * 10**9, prompts=256)


@pytest.mark.parametrize(
    ("gpus", "layout"),
    [
        (0, Layout(1, 1, 1, 1)),
        (1, Layout(1, 1, 1, 1, server_memory=0.25)),
        (2, Layout(1, 1, 1, 1, server_memory=0.45)),
        (3, Layout(1, 1, 1, 1)),
        (4, Layout(1, 1, 1, 2)),
        (8, Layout(2, 1, 2, 4)),
        (16, Layout(4, 1, 4, 8)),
    ],
)
def test_usual_nodes(gpus: int, layout: Layout) -> None:
    assert plan_layout([H100] * gpus, SMALL) == layout


@pytest.mark.parametrize(
    ("demand", "gpus", "layout"),
    [
        (Demand(16 * 10**9, 16 * 10**9, 256), 8, Layout(4, 4, 1, 3)),  # an 8B policy: 160 GB to train
        (Demand(10**9, 0, 256, teacher=False), 8, Layout(4, 1, 4, 0)),
        (Demand(10**9, 10**9, 256, engines=False), 8, Layout(2, 1, 0, 6)),
        (Demand(10**9, 0, 256, engines=False, teacher=False), 8, Layout(8, 1, 0, 0)),
        (Demand(10**9, 0, 6, teacher=False), 8, Layout(2, 1, 6, 0)),  # 6 prompts do not divide among 4 replicas
        (Demand(10**9, 10**9, 256, rewriter=True), 8, Layout(1, 1, 2, 4, 1)),  # a judge and a rewriter
        (Demand(10**9, 10**9, 256, samples=False, judges=False), 8, Layout(4, 1, 3, 1)),  # they work at the end alone
        (Demand(10**9, 10**9, 256, judges=False), 8, Layout(4, 1, 3, 1)),  # a pair by kinds
        (Demand(10**9, 10**9, 256, samples=False), 8, Layout(2, 1, 1, 5)),  # rewrites
        (Demand(10**9, 10**9, 256, own_tensor=4), 8, Layout(4, 4, 1, 3)),
        (Demand(10**9, 10**9, 256, own_pipeline=4), 8, Layout(4, 1, 1, 3)),
        (Demand(10**9, 10**9, 256, own_tensor=2, own_pipeline=2), 16, Layout(4, 2, 4, 8)),
        (Demand(10**9, 10**9, 256, own_engines=6, shares=True), 4, Layout(1, 1, 6, 1)),
        (Demand(10**9, 10**9, 256, own_engines=3), 2, Layout(1, 1, 3, 1, server_memory=0.23)),
        (Demand(10**9, 10**9, 256, own_engines=1, own_teachers=6), 8, Layout(1, 1, 1, 6)),
        (Demand(10**9, 10**9, 256, own_engines=4), 8, Layout(2, 1, 4, 2)),
        (Demand(10**9, 10**9, 256, own_teachers=1), 8, Layout(2, 1, 2, 1)),
        (Demand(10**9, 10**9, 256, own_teachers=5), 8, Layout(2, 1, 1, 5)),
        (Demand(10**9, 10**9, 256, engines=False), 1, Layout(1, 1, 0, 1, server_memory=0.5)),
        (Demand(10**9, 10**9, 256, rewriter=True), 3, Layout(1, 1, 1, 1, 1, server_memory=0.45)),
    ],
)
def test_other_demands(demand: Demand, gpus: int, layout: Layout) -> None:
    assert plan_layout([H100] * gpus, demand) == layout


PAPER = ("quality=1", "safety=1")
CHEAP = (*PAPER, "--judge-schedule", "circulant_bt", "--judge-verdict", "soft")


@pytest.mark.parametrize("judging", [PAPER, CHEAP, ("likelihood=1",)], ids=["the paper's", "cheap", "likelihood"])
@pytest.mark.parametrize("judge", ["llama-3.2-1b", "llama-3.1-8b"])
@pytest.mark.parametrize("gpus", [4, 8, 16])
def test_a_step_takes_at_most_twice_what_it_does_by_the_planner_s_best_division(
    gpus: int, judge: str, judging: tuple[str, ...]
) -> None:
    layout = plan_layout([H100] * gpus, Demand(25 * 10**8, 16 * 10**9, 256))
    roles = map(str, (layout.trainers, layout.engines, layout.teachers))
    words = ("--policy", "llama-3.2-1b", "--judge", judge, "--gpus", str(gpus), "--roles", *roles)
    found = plan([*words, "--preset", "continual", "--criteria", *judging])
    given, best = (found[which]["step"][found["order"]] for which in ("given", "best"))
    assert best <= given <= 2 * best


@pytest.mark.parametrize(
    ("demand", "gpus", "named"),
    [
        (Demand(10**9, 140 * 10**9, 256), 8, "the teacher's weights .140.0 GB.*--teacher-url"),
        (Demand(16 * 10**9, 10**9, 256), 2, "training takes about 160.0 GB"),
        (Demand(30 * 10**9, 10**9, 256), 1, "the policy's weights"),
        (
            Demand(10**9, 10**9, 256, own_engines=8),
            8,
            "8 GPUs do not hold 1 of the trainer and 9 servers: lower --rollout",
        ),
        (Demand(16 * 10**9, 10**9, 256, own_teachers=4), 8, "8 GPUs do not hold 4 of the trainer and 5 servers"),
    ],
)
def test_a_model_that_does_not_fit_is_named(demand: Demand, gpus: int, named: str) -> None:
    with pytest.raises(LayoutError, match=named):
        plan_layout([H100] * gpus, demand)


@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 40), st.integers(1, 300), *[st.booleans()] * 3)
def test_no_layout_asks_for_more_than_there_is(
    gpus: int, policy: int, teacher: int, prompts: int, engines: bool, teachers: bool, rewriter: bool
) -> None:
    demand = Demand(policy * 10**9, teacher * 10**9, prompts, engines, teachers, rewriter)
    try:
        layout = plan_layout([H100] * gpus, demand)
    except LayoutError:
        assume(False)
    servers = layout.engines + layout.teachers + layout.rewriters
    assert (layout.engines > 0, layout.teachers > 0, layout.rewriters) == (engines, teachers, rewriter)
    assert layout.trainers % layout.tensor_parallel == 0
    assert prompts % (layout.trainers // layout.tensor_parallel) == 0
    if layout.server_memory is None:
        assert layout.trainers + servers == gpus or not (engines or teachers)
        assert layout.trainers + servers <= gpus
    else:
        assert layout.trainers == 1
        assert layout.server_memory * servers <= (0.5 if gpus == 1 else 0.9) * max(1, gpus - 1) + 0.02
    assert str(layout)
