"""What the training-step benchmark says a step computes, counted in the rows that it trains on."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from megatron_sip.kernels.tree_attention.dense import token_spans, visibility
from megatron_sip.model.packing import PackedRow, build_row
from megatron_sip.records import Example

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
NAMES = st.text(st.characters(codec="utf-8", exclude_characters=","), max_size=30)
"""Without commas, by which the test counts what stands in a line."""
JSON_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abc\u20ac ", max_size=90)
)


class CharacterTokenizer:
    """Stands for the model's tokenizer: an id a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step_variant")


def scores(row: PackedRow) -> int:
    return int(visibility(token_spans(row.layout, len(row.tokens))).sum())


def predicted(rows: list[PackedRow]) -> list[tuple[int, list[int]]]:
    """(task, targets) of each branch; they are those of the branch that the loss takes them for."""
    found = []
    for row in rows:
        tasks = [example.task_index for example in row.examples for _ in example.branches]
        ends = row.branch_offsets.tolist()
        for line, (task, branch) in enumerate(zip(tasks, row.branches, strict=True)):
            assert row.targets[ends[line] : ends[line + 1]].tolist() == branch.ids
            found.append((task, branch.ids))
    return found


@pytest.mark.parametrize(("objective", "examples", "branches"), [("dpo", 3, 2), ("grpo", 1, 5)])
def test_counted_work_is_that_of_the_rows(variant: ModuleType, objective: str, examples: int, branches: int) -> None:
    problem = variant.Problem(objective, examples, prefix=13, branches=branches, branch=5, row_examples=1)
    data: list[Example] = variant.make_examples(problem, CharacterTokenizer())
    packed = [build_row(data, [index], problem.tokens(True) // examples, 0) for index in range(examples)]
    unpacked = variant.unpacked_rows(problem, data, pad_id=0)
    for rows, shares in ((packed, True), (unpacked, False)):
        assert sum(len(row.tokens) for row in rows) == problem.tokens(shares)
        assert sum(len(row.predictor_positions) for row in rows) == problem.projected(shares)
        assert sum(map(scores, rows)) == problem.scores(shares)
    assert predicted(packed) == predicted(unpacked)
    assert predicted(packed) == [(e, branch.ids) for e in range(examples) for branch in data[e].branches]


def test_a_pair_that_shares_nothing_is_one_row(variant: ModuleType) -> None:
    problem = variant.Problem("dpo", 2, prefix=7, branches=2, branch=3, row_examples=1)
    data = variant.make_examples(problem, CharacterTokenizer())
    rows = variant.unpacked_rows(problem, data, pad_id=0)
    assert [row.layout.tolist() for row in rows] == [[[0, 7, 7, 10], [10, 17, 17, 20]]] * 2
    assert [row.examples for row in rows] == [(data[0],), (data[1],)]


def test_measurements_that_would_not_end_in_time_are_left_out(
    variant: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark = importlib.import_module("train_step")
    config = LlamaConfig(head_dim=64)
    config.save_pretrained(tmp_path)
    now = 0.0

    trl_times_slower = 5

    def step_seconds(setting: Any) -> float:
        times_slower = trl_times_slower if setting.implementation == "trl" else 1
        return float(times_slower * benchmark.setting_flops(setting, config) / 1e12)

    def seconds_of(setting: Any) -> float:
        return 7 + (setting.warm_up + 1) * step_seconds(setting)

    def measure(setting: Any, model: Path, timeout_s: float) -> dict[str, Any]:
        nonlocal now
        now += min(seconds_of(setting), timeout_s)
        if seconds_of(setting) > timeout_s:
            raise subprocess.TimeoutExpired(setting.variant, timeout_s)
        return {"seconds": [step_seconds(setting)], "process_seconds": seconds_of(setting)}

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "gemm_peak", lambda *_, **__: 1.0)
    for wanted in (1, 3, len(benchmark.SETTINGS)):
        now = 0.0
        time_for_those = sum(map(seconds_of, benchmark.SETTINGS[:wanted]))
        runs, _ = benchmark.measure_rounds(benchmark.SETTINGS, 1, time_for_those * 1.001, tmp_path)
        assert list(runs) == list(benchmark.SETTINGS[:wanted])
    now = 0.0
    assert len(benchmark.measure_rounds(benchmark.SETTINGS, 1, -1.0, tmp_path)[0]) == 1
    now, trl_times_slower, budget = 0.0, 1000, sum(map(seconds_of, benchmark.SETTINGS))
    runs, _ = benchmark.measure_rounds(benchmark.SETTINGS, 1, budget, tmp_path)  # TRL is ended, as nobody expected
    assert now <= budget
    assert runs
    assert "trl" not in {setting.implementation for setting in runs}
    assert {setting.variant for setting in benchmark.SETTINGS} == set(variant.VARIANTS)


def test_variants_that_lack_a_number_do_not_agree_on_it(variant: ModuleType) -> None:
    benchmark = importlib.import_module("train_step")
    rows = [
        SimpleNamespace(name=name, allocator="default", computed={"loss": 0.5}) for name in ("dpo_packed", "dpo_trl")
    ]
    assert benchmark.disagreements(rows) == ["grad_norm of dpo is known only of []"]
    for row in rows:
        row.computed["grad_norm"] = 1.0
    assert benchmark.disagreements(rows) == []
    rows[0].computed["chosen_logprob"] = -9.0
    assert benchmark.disagreements(rows) == ["chosen_logprob of dpo is known only of ['dpo_packed, default']"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(JSON_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)))
def test_a_report_is_json_in_lines_that_are_not_too_long(variant: ModuleType, value: Any) -> None:
    machine = importlib.import_module("machine")
    text = machine.laid_out(value)
    assert json.loads(text) == value
    assert all(len(line) <= machine.LINE_LENGTH or line.count(",") < 2 for line in text.splitlines())
