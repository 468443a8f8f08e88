"""Which of Megatron's flags a machine gets for what it lacks, and what its user is told."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from megatron_sip.kernels import extension
from megatron_sip.platform.megatron import (
    TRANSFORMER_ENGINE,
    arguments_for,
    machine_arguments,
    prepare_megatron,
    slow_parts,
    transformer_engine_line,
)
from megatron_sip.platform.megatron_fixes import _let_transformer_engine_fuse_gradients

NO_FUSION = "--no-gradient-accumulation-fusion"


def test_with_transformer_engine_nothing_is_taken_away() -> None:
    assert arguments_for(cuda=True, transformer_engine=True) == []


def test_cuda_without_transformer_engine_takes_local_layers_on_nccl() -> None:
    flags = arguments_for(cuda=True, transformer_engine=False)
    assert flags[flags.index("--transformer-impl") + 1] == "local"
    assert NO_FUSION in flags
    assert "gloo" not in flags


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_without_cuda_everything_is_local_and_gloo(transformer_engine: bool) -> None:
    flags = arguments_for(cuda=False, transformer_engine=transformer_engine)
    assert {"local", "gloo"} <= set(flags)
    assert NO_FUSION not in flags  # ours takes Apex's place


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA these packages are wanted")
def test_without_cuda_starting_loads_no_compiler_and_no_gpu_kernels() -> None:
    """Each takes seconds to import, in every process of a run."""
    start = (
        "import sys, torch\n"
        "compiled = torch.compile\n"
        "from megatron_sip.platform.megatron import prepare_megatron\n"
        "prepare_megatron()\n"
        "import megatron.training\n"
        "from megatron_sip.kernels.tree_attention.flex import FlexTreeAttention\n"
        "FlexTreeAttention()\n"  # each model has one
        "assert torch.compile is compiled\n"
        "print(*sorted({name.split('.')[0] for name, module in sys.modules.items() if module is not None}))\n"
        "print('compiler:', 'torch._inductor.compile_fx' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True, timeout=300)
    loaded, compiler = done.stdout.strip().splitlines()[-2:]
    assert "megatron" in loaded.split()
    assert not {"flash_attn", "flash_mla", "flashinfer"} & set(loaded.split())
    assert compiler == "compiler: False"


@pytest.mark.parametrize("found", [False, True])
def test_with_cuda_megatron_itself_says_what_it_found(found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed and does not load is none: Megatron goes on without it."""
    prepare_megatron()  # before CUDA seems to be there
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", found)
    assert ("local" not in machine_arguments()) == found
    assert (NO_FUSION not in machine_arguments()) == found


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_transformer_engine_fuses_gradients_without_apex(
    transformer_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's output layer, which is only a weight here, asks for Apex's kernel; it gets one that adds the same."""
    prepare_megatron()
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(extension, "HAVE_TE", transformer_engine)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None)
    _let_transformer_engine_fuse_gradients()
    assert layers._grad_accum_fusion_available == transformer_engine
    if transformer_engine:
        total_input, grad_output, main_grad = torch.randn(6, 4), torch.randn(6, 3), torch.ones(3, 4)
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(total_input, grad_output, main_grad)
        torch.testing.assert_close(main_grad, 1 + grad_output.T @ total_input)


@pytest.mark.parametrize(
    ("installed", "loaded", "said"),
    [
        (None, False, "no Transformer Engine: Megatron's own layers run"),
        ("2.20.2", False, "2.20.2 does not load, so Megatron's own layers run"),
        ("2.7.0", True, "Transformer Engine 2.7.0: this Megatron is made for 2.8 or later, before 2.21"),
        ("2.21.0", True, "Transformer Engine 2.21.0: this Megatron is made for"),
        ("2.8.0", True, None),
        ("2.20.2", True, None),
    ],
)
def test_one_line_says_what_is_wrong_with_transformer_engine(
    installed: str | None, loaded: bool, said: str | None
) -> None:
    line = transformer_engine_line(installed, loaded)
    assert line == said if said is None else said in (line or "")
    assert "\n" not in (line or "")


def test_its_versions_are_those_of_the_extra_gpu() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, last = TRANSFORMER_ENGINE
    assert project["optional-dependencies"]["gpu"] == [f"transformer-engine[pytorch]>={first},<{last}"]


def test_kernels_without_cuda_are_told_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slow_parts() == []
    prepare_megatron()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "compiled_devices", lambda: ("CPU",))
    [_, line] = slow_parts()
    assert "no CUDA kernels built: plain torch takes its place" in line
    assert "MEGATRON_SIP_CUDA=1" in line
    monkeypatch.setattr(extension, "compiled_devices", lambda: ("CPU", "CUDA"))
    assert len(slow_parts()) == 1
