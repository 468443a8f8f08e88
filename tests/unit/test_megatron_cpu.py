"""Which of Megatron's flags a machine gets for what it lacks."""

from __future__ import annotations

import pytest

from megatron_sip.platform.megatron_cpu import arguments_for

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
