"""Parts of the trainer that need no model: sums of branches, and which optimizers take fused steps."""

from __future__ import annotations

import torch

from megatron_sip.platform.megatron_cpu import enable_cpu

enable_cpu()

from megatron_sip.training.trainer import branch_sums, take_fused_steps  # noqa: E402


def test_branch_sums_lose_nothing_over_long_branches() -> None:
    lengths = torch.tensor([2048, 0, 1, 512])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logprobs = (-10 * torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(0))).requires_grad_()
    exact = [part.sum().item() for part in logprobs.detach().double().split(lengths.tolist())]
    sums = branch_sums(logprobs, offsets)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), torch.tensor(exact).double(), rtol=6e-8, atol=0)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (sums * weights).sum().backward()
    assert torch.equal(logprobs.grad, weights.repeat_interleave(lengths))


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
