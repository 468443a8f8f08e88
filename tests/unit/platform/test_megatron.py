"""Which of Megatron's flags a machine gets for what it lacks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_sip.platform.megatron import arguments_for, machine_arguments, prepare_megatron

NO_FUSION = "--no-gradient-accumulation-fusion"


@pytest.mark.parametrize("apex", [False, True])
def test_transformer_engine_alone_cannot_fuse_the_output_layer_s_gradient(apex: bool) -> None:
    flags = arguments_for(cuda=True, transformer_engine=True, apex=apex)
    assert (NO_FUSION in flags) == (not apex)
    assert "--transformer-impl" not in flags


def test_cuda_without_transformer_engine_takes_local_layers_on_nccl() -> None:
    flags = arguments_for(cuda=True, transformer_engine=False, apex=False)
    assert flags[flags.index("--transformer-impl") + 1] == "local"
    assert NO_FUSION in flags
    assert "gloo" not in flags


@pytest.mark.parametrize("transformer_engine", [False, True])
def test_without_cuda_everything_is_local_and_gloo(transformer_engine: bool) -> None:
    flags = arguments_for(cuda=False, transformer_engine=transformer_engine, apex=False)
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
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", found)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", found)
    assert ("local" not in machine_arguments()) == found
    assert (NO_FUSION not in machine_arguments()) == found
