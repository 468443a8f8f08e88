"""Packed prefix trees train exactly as separate rows do: loss and every parameter's gradient, at every layout.

The reference is one process, every branch alone behind its own copy of the prefix, plain autograd. Against it stand
packed rows through Megatron's schedule with tensor, pipeline, sequence and data parallelism and recomputation. In
bfloat16, where kernels of our own do most of the work, they come as near to that as eight bits allow.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from workers import run_worker, save_tiny_llama

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "packing_worker.py"
RELATIVE = 1e-5
BF16_RELATIVE = 0.04
"""Of a gradient's norm. Separate rows in bfloat16 are off by up to 0.02 themselves, and packed ones as much."""
TIMEOUT_S = 400

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
SELECTIVE = ("--recompute-granularity", "selective")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")

ONE_PROCESS = {
    "plain": (),
    "selective_recompute": SELECTIVE,
    "full_recompute": FULL,
}
FOUR_PROCESSES = {
    "dp4": (),
    "dp4_overlapped": ("--overlap-grad-reduce",),
    "tp2_dp2": TP2,
    "tp2_sp_dp2_full_recompute": (*TP2, "--sequence-parallel", *FULL),
    "pp2_dp2": PP2,
    "tp2_pp2_sp_selective_recompute": (*TP2, *PP2, "--sequence-parallel", *SELECTIVE),
}
IN_BFLOAT16 = {
    1: {"bf16": (), "bf16_full_recompute": FULL, "bf16_float_residual": ("--fp32-residual-connection",)},
    4: {"bf16_tp2_sp_dp2": (*TP2, "--sequence-parallel"), "bf16_pp2_dp2": PP2},
}
PROBLEMS = {"dpo": "untied", "grpo": "tied"}
SPLIT = {1: {"split": ()}, 4: {"split_tp2_dp2": TP2, "split_pp2_dp2": PP2}}
"""GRPO's groups of up to 16 branches in rows of at most 3."""


def launch(cases: list[dict], processes: int, folder: Path) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    run_worker(WORKER, folder / "cases.json", folder, processes=processes, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, run in two launches; the folder with their result files."""
    folder = tmp_path_factory.mktemp("packing")
    # Weights that bfloat16 holds exactly; heads of 32 and more are rotated by our kernels.
    changes = {"tied": {"tie_word_embeddings": True}, "untied": {}}
    changes["long"] = {"tie_word_embeddings": True, "hidden_size": 128, "intermediate_size": 192}
    models = {kind: str(save_tiny_llama(folder / kind, 1, torch.bfloat16, **own)) for kind, own in changes.items()}

    def case(
        name: str,
        problem: str,
        flags: tuple[str, ...],
        row_length: int = 160,
        separate: bool = False,
        branches_per_row: int | None = None,
    ) -> dict:
        model = models["long" if problem == "long" else PROBLEMS.get(problem, "untied")]
        dtype = "bfloat16" if name.startswith("bf16") else "float32"
        entry = {"name": f"{problem}_{name}", "problem": problem, "hf_dir": model, "dtype": dtype, "flags": flags}
        return entry | {"row_length": row_length, "separate": separate, "branches_per_row": branches_per_row}

    alone = [case("separate", problem, (), separate=True) for problem in (*PROBLEMS, "few", "long")]
    packed = {
        processes: [case(name, problem, flags, 240) for problem in PROBLEMS for name, flags in layouts.items()]
        for processes, layouts in ((1, ONE_PROCESS), (4, FOUR_PROCESSES))
    }
    for processes, layouts in IN_BFLOAT16.items():
        packed[processes] += [case(name, "long", flags, 720) for name, flags in layouts.items()]
    for processes, layouts in SPLIT.items():
        packed[processes] += [case(name, "grpo", flags, 80, branches_per_row=3) for name, flags in layouts.items()]
    launch(alone + packed[1], 1, folder)
    # Five rows of one pair each for four replicas: three of the eight micro-batches are fillers.
    launch([*packed[4], case("fillers", "few", (), row_length=48)], 4, folder)
    return folder


def read(results: Path, name: str) -> tuple[float, int, dict[str, torch.Tensor]]:
    files = [torch.load(path) for path in sorted(results.glob(f"{name}.*.pt"))]
    losses = {round(file["loss"], 6) for file in files if file["loss"] == file["loss"]}
    assert len(losses) == 1
    grads: dict[str, torch.Tensor] = {}
    for file in files:
        assert not grads.keys() & file["grads"].keys()
        grads |= file["grads"]
    loss = next(file["loss"] for file in files if file["loss"] == file["loss"])
    return loss, files[0]["fillers"], grads


def assert_equal(results: Path, problem: str, name: str) -> int:
    loss, fillers, grads = read(results, f"{problem}_{name}")
    expected_loss, _, expected = read(results, f"{problem}_separate")
    assert loss == pytest.approx(expected_loss, rel=RELATIVE)
    assert grads.keys() == expected.keys()
    assert len(grads) == 2 * 9 + 2 + (problem in ("dpo", "few"))
    for key, grad in expected.items():
        assert grad.abs().max() > 1e-6, f"{key} has no gradient to compare"
        error = (grads[key] - grad).abs().max() / grad.abs().max()
        assert error <= RELATIVE, f"{name} {key}: relative error {error:.2e}"
    return fillers


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("layout", [*ONE_PROCESS, *FOUR_PROCESSES])
def test_packed_rows_give_the_loss_and_gradients_of_separate_rows(results, problem, layout):
    assert_equal(results, problem, layout)


@pytest.mark.parametrize("layout", [name for layouts in SPLIT.values() for name in layouts])
def test_groups_split_over_rows_give_the_loss_and_gradients_of_separate_rows(results, layout):
    assert_equal(results, "grpo", layout)


def test_filler_rows_change_nothing(results):
    assert assert_equal(results, "few", "fillers") == 3


@pytest.mark.parametrize("layout", [name for layouts in IN_BFLOAT16.values() for name in layouts])
def test_packed_rows_in_bfloat16_are_near_separate_rows_in_float32(results, layout):
    loss, _, grads = read(results, f"long_{layout}")
    expected_loss, _, expected = read(results, "long_separate")
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        error = (grads[key].float() - grad).norm() / grad.norm()
        assert 0 < error <= BF16_RELATIVE, f"{layout} {key}: relative error {error:.2e}"
