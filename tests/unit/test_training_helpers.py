"""The helpers that integration tests compare whole runs with must not call two runs equal that computed nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "integration"))
    import training

    monkeypatch.delitem(sys.modules, "training")
    return training


def test_a_metric_that_both_runs_lack_is_an_error(training: ModuleType) -> None:
    complete: dict[str, Any] = {"step": 1} | dict.fromkeys(training.LEARNT, 0.5)
    assert training.learnt([complete]) == [[1] + [0.5] * len(training.LEARNT)]
    lacking = {name: value for name, value in complete.items() if name != "grad_norm"}
    with pytest.raises(AssertionError, match="step 1 has no grad_norm"):
        training.learnt([lacking])


def test_runs_without_a_step_are_an_error(training: ModuleType) -> None:
    with pytest.raises(AssertionError, match="no step"):
        training.learnt([])
