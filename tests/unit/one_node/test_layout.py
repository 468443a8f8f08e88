"""How GPUs are divided: by hand for the usual nodes, by property for all."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_sip.one_node.layout import Demand, Layout, LayoutError, plan_layout

H100 = 80 * 10**9
SMALL = Demand(policy_bytes=270 * 10**6, teacher_bytes=2 * 10**9, prompts=256)


@pytest.mark.parametrize(
    ("gpus", "layout"),
    [
        (0, Layout(1, 1, 1, 1)),
        (1, Layout(1, 1, 1, 1, server_memory=0.25)),
        (2, Layout(1, 1, 1, 1, server_memory=0.45)),
        (3, Layout(1, 1, 1, 1)),
        (4, Layout(2, 1, 1, 1)),
        (8, Layout(4, 1, 3, 1)),
    ],
)
def test_usual_nodes(gpus: int, layout: Layout) -> None:
    assert plan_layout([H100] * gpus, SMALL) == layout


@pytest.mark.parametrize(
    ("demand", "gpus", "layout"),
    [
        (Demand(16 * 10**9, 16 * 10**9, 256), 8, Layout(4, 4, 3, 1)),  # an 8B policy: 160 GB to train
        (Demand(10**9, 0, 256, teachers=0), 8, Layout(4, 1, 4, 0)),
        (Demand(10**9, 10**9, 256, engines=False), 8, Layout(4, 1, 0, 1)),
        (Demand(10**9, 0, 256, engines=False, teachers=0), 8, Layout(8, 1, 0, 0)),
        (Demand(10**9, 10**9, 6), 8, Layout(2, 1, 5, 1)),  # 6 prompts do not divide among 4 replicas
        (Demand(10**9, 10**9, 256, teachers=2), 8, Layout(2, 1, 4, 2)),  # a judge and a rewriter
        (Demand(10**9, 10**9, 256, engines=False), 1, Layout(1, 1, 0, 1, server_memory=0.5)),
    ],
)
def test_other_demands(demand: Demand, gpus: int, layout: Layout) -> None:
    assert plan_layout([H100] * gpus, demand) == layout


@pytest.mark.parametrize(
    ("demand", "gpus", "named"),
    [
        (Demand(10**9, 140 * 10**9, 256), 8, "the teacher's weights .140.0 GB.*--teacher-url"),
        (Demand(16 * 10**9, 10**9, 256), 2, "training takes about 160.0 GB"),
        (Demand(30 * 10**9, 10**9, 256), 1, "the policy's weights"),
    ],
)
def test_a_model_that_does_not_fit_is_named(demand: Demand, gpus: int, named: str) -> None:
    with pytest.raises(LayoutError, match=named):
        plan_layout([H100] * gpus, demand)


@given(
    st.integers(1, 16), st.integers(0, 40), st.integers(0, 40), st.integers(1, 300), st.booleans(), st.integers(0, 2)
)
def test_no_layout_asks_for_more_than_there_is(
    gpus: int, policy: int, teacher: int, prompts: int, engines: bool, teachers: int
) -> None:
    demand = Demand(policy * 10**9, teacher * 10**9, prompts, engines, teachers)
    try:
        layout = plan_layout([H100] * gpus, demand)
    except LayoutError:
        assume(False)
    servers = layout.engines + layout.teachers
    assert (layout.engines > 0, layout.teachers) == (engines, teachers)
    assert layout.trainers % layout.tensor_parallel == 0
    assert prompts % (layout.trainers // layout.tensor_parallel) == 0
    if layout.server_memory is None:
        assert layout.trainers + servers <= gpus
    else:
        assert layout.trainers == 1
        assert layout.server_memory * servers <= (0.5 if gpus == 1 else 0.9) * max(1, gpus - 1) + 0.02
    assert str(layout)
