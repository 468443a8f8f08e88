"""The log-prob op needs no memory of the logits' size beside the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_sip.kernels.logprob import token_logprobs


def allocated_bytes(logits: Tensor) -> int:
    """What forward and backward from `logits` allocate, freed or not."""
    rows = torch.arange(len(logits))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        tokens = token_logprobs(logits, rows, rows)
        (tokens * torch.linspace(0.5, -0.25, len(rows))).sum().backward()
    return sum(max(event.self_cpu_memory_usage, 0) for event in recorded.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_temporary_of_the_logits_size(dtype: torch.dtype) -> None:
    leaf = torch.randn(64, 20_000).to(dtype).requires_grad_()
    logits = leaf + 0
    found = allocated_bytes(logits)
    assert 0 < found < logits.nbytes / 20
    assert leaf.grad is not None
