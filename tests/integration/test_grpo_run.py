"""Whole runs of GRPO with real Megatron and real SGLang servers: on documents, killed, continued, replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import kill_when, last_step, lines, output, steps, tracked, train

from megatron_sip.serving.launch import LocalServer

pytestmark = pytest.mark.slow

GRPO = (
    *("--objective", "grpo", "--candidates", "suffix", "rollout", "--num-rollouts", "4", "--branches-per-row", "3"),
    *("--grpo-kl-coef", "0.01", "--ref-update-interval", "2", "--grpo-length", "constant"),
    *("--train-iters", "4", "--save-interval", "1"),
)
TRAINED = ("loss", "grad_norm", "grpo/reward", "grpo/kl", "grpo/sampled_nll", "examples", "rollout_logratio")


@pytest.fixture(scope="module")
def model(corpus: Path, tiny_llama_dir: Path) -> tuple[str, ...]:
    return ("--hf-config", str(tiny_llama_dir), "--data-path", str(corpus))


@pytest.fixture(scope="module")
def recorded(
    model: tuple[str, ...],
    tiny_engine: LocalServer,
    tiny_llama_server: LocalServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run judged by likelihood, its groups in `groups` beside it."""
    run = tmp_path_factory.mktemp("grpo") / "run"
    servers = ("--rollout-url", tiny_engine.url, "--teacher-url", tiny_llama_server.url, "--criteria", "likelihood=1")
    train(run, *model, *GRPO, *servers, "--save-groups", str(run.with_name("groups")))
    return run


def test_a_run_learns_from_all_rollouts_of_its_groups(recorded: Path) -> None:
    records = steps(recorded)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[0]["grpo/kl"] == pytest.approx(0.0, abs=1e-6)  # policy and reference are still equal
    assert records[1]["grpo/kl"] > 1e-6
    for record in records:
        assert record["examples"] == record["groups"] == 4
        assert record["grpo/branches"] == 16
        assert record["packing/rows"] >= 4
        assert record["grpo/engine_ratio"] == pytest.approx(1.0, abs=1e-3)  # both are float32
        assert record["grpo/corrected_share"] == record["grpo/clipped_fraction"] == 0.0
        assert record["grpo/reward_spread"] > 0
        assert record["grpo/reward"] == pytest.approx(record["score/rollout"])
        assert record["grad_norm"] > 0


def test_killed_and_continued_it_trains_on_the_same_groups_to_the_same_numbers(
    recorded: Path, model: tuple[str, ...], tmp_path: Path
) -> None:
    """From its recorded groups, without servers: sampled rollouts would be others."""
    run = tmp_path / "killed"
    flags = (*model, *GRPO, "--replay-groups", str(recorded.with_name("groups")))
    kill_when(run, lambda: last_step(run) >= 2 and tracked(run) is not None, *flags)
    assert (tracked(run) or 0) >= 1
    first = lines(run)[:1]
    train(run, *flags)
    assert lines(run)[:1] == first
    assert "successfully loaded checkpoint" in output(run)
    for before, after in zip(steps(recorded), steps(run), strict=True):
        assert [after[name] for name in TRAINED] == [before[name] for name in TRAINED]
