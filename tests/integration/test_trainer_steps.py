"""Steps without a finite loss or gradient, and runs that continue under other settings, on two replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workers import run_worker, save_tiny_llama

WORKER = Path(__file__).with_name("trainer_worker.py")
KINDS = {"plain": [], "distributed": ["--use-distributed-optimizer"]}
FAULTS = (None, "loss", "gradient", None)
BEFORE = ["--train-iters", "4", "--lr", "1e-3", "--lr-decay-style", "linear", "--lr-warmup-iters", "1"]
AFTER = [
    *("--train-iters", "10", "--lr", "4e-4", "--min-lr", "2e-4", "--lr-decay-style", "linear", "--lr-warmup-iters"),
    "0",
    *("--adam-eps", "1e-6", "--adam-beta2", "0.95"),
]
TOO_LARGE = ["--initial-loss-scale", str(2.0**18), "--hysteresis", "1"]


def cases(folder: Path) -> list[dict[str, Any]]:
    constant = ["--train-iters", "8", "--lr", "1e-3", "--lr-decay-style", "linear"]
    found = []
    for kind, flags in KINDS.items():
        saved = str(folder / f"run_{kind}")
        found += [
            {"name": f"faulty {kind}", "dtype": "bfloat16", "flags": [*constant, *flags], "faults": FAULTS},
            {
                "name": f"megatron {kind}",
                "dtype": "bfloat16",
                "flags": [*constant, *flags],
                "faults": [None],
                "megatron": 1,
            },
            {"name": f"before {kind}", "flags": [*BEFORE, *flags, "--save", saved], "faults": [None, None]},
            {"name": f"after {kind}", "flags": [*AFTER, *flags, "--load", saved], "faults": [None]},
        ]
    found.append(
        {"name": "float16", "dtype": "float16", "flags": [*constant, *TOO_LARGE], "faults": [None, "gradient"]}
    )
    found.append({"name": "float32", "flags": constant, "faults": [None]})
    return [{"dtype": "float32"} | case for case in found]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[list[dict[str, Any]]]], str]:
    """By case and rank the steps, the first of which is the state before any; and what was printed."""
    work = tmp_path_factory.mktemp("steps")
    (work / "cases.json").write_text(json.dumps(cases(work)))
    files = (save_tiny_llama(work / "model", 1), work / "cases.json", work)
    printed = run_worker(WORKER, *files, processes=2)
    names = [case["name"] for case in cases(work)]
    return {n: [json.loads((work / f"{n}.{rank}.json").read_text()) for rank in (0, 1)] for n in names}, printed


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_finite_gradient_changes_nothing_and_the_next_one_goes_on(results: Any, kind: str) -> None:
    for steps in results[0][f"faulty {kind}"]:  # one rank has the bad row, both skip the step
        states = [step["state"] for step in steps]
        assert states[1] == states[2] == states[3]
        assert len({states[0], states[1], states[4]}) == 3
        skipped = [step["metrics"].get("non_finite_steps", 0.0) for step in steps[1:]]
        assert skipped == [0.0, 1.0, 1.0, 0.0]
        rates = [step["metrics"]["learning_rate"] for step in steps[1:]]
        assert rates == pytest.approx([1e-3 * (1 - step / 8) for step in range(4)])
        assert "loss" not in steps[2]["metrics"]
        assert steps[3]["metrics"]["loss"] > 0
        assert "grad_norm" not in steps[3]["metrics"]
        assert steps[4]["metrics"]["grad_norm"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_megatron_s_own_bit_for_bit(results: Any, kind: str) -> None:
    for ours, megatrons in zip(results[0][f"faulty {kind}"], results[0][f"megatron {kind}"], strict=True):
        assert [step["state"] for step in ours[:2]] == [step["state"] for step in megatrons]
        assert ours[1]["metrics"]["grad_norm"] == megatrons[1]["metrics"]["grad_norm"] > 1.0  # it is clipped


def test_a_skipped_step_is_told_with_its_tasks(results: Any) -> None:
    told = [line for line in results[1].splitlines() if " skipped: " in line]
    assert told[0] == "step 2 skipped: the loss is nan; its tasks: 0-3"
    assert told[1] == "step 3 skipped: the gradient norm is nan; its tasks: 0-3"


def test_float16_tries_a_step_again_at_a_lower_loss_scale_until_it_fits(results: Any) -> None:
    [first, _], [exact, _] = results[0]["float16"], results[0]["float32"]
    metrics = first[1]["metrics"]
    assert metrics["overflows"] > 0
    assert metrics["loss_scale"] == 2.0 ** (18 - metrics["overflows"])
    assert "skipped_steps" not in metrics
    assert metrics["grad_norm"] == pytest.approx(exact[1]["metrics"]["grad_norm"], rel=2e-2)
    assert first[1]["settings"]["updates"] == [1.0]


def test_float16_gives_a_step_up_after_ten_overflows(results: Any) -> None:
    for steps in results[0]["float16"]:
        assert steps[2]["state"] == steps[1]["state"]
        assert steps[2]["metrics"]["overflows"] == 10
        assert steps[2]["metrics"]["non_finite_steps"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_under_other_settings_where_it_was(results: Any, kind: str) -> None:
    for before, after in zip(results[0][f"before {kind}"], results[0][f"after {kind}"], strict=True):
        assert after[0]["state"] == before[-1]["state"]
        found = after[1]["settings"]
        assert after[1]["metrics"]["learning_rate"] == pytest.approx(2e-4 + 2e-4 * (1 - 2 / 10))
        assert (found["eps"], found["betas"], found["updates"]) == (1e-6, [0.9, 0.95], [3.0])
        assert after[1]["state"] != after[0]["state"]
