"""Parts of the trainer that need no model: which optimizers take fused steps."""

from __future__ import annotations

import torch

from megatron_sip.platform.megatron import prepare_megatron

prepare_megatron()

from megatron_sip.training.trainer import take_fused_steps  # noqa: E402


def test_adam_takes_fused_steps_and_makes_the_same_ones() -> None:
    def step(fused: bool) -> torch.Tensor:
        weight = torch.linspace(-1, 1, 1000).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
        if fused:
            take_fused_steps(optimizer.param_groups)
            assert optimizer.param_groups[0]["fused"]
        for _ in range(3):
            weight.grad = weight.detach() ** 2 - 0.5
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(step(True), step(False), rtol=1e-6, atol=1e-7)


def test_an_optimizer_without_a_fused_step_is_left_alone() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "fused": None, "capturable": True}]
    before = [dict(group) for group in groups]
    take_fused_steps(groups)
    assert groups == before
