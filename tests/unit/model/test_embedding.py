"""The embedding whose gradient goes to `main_grad` directly."""

from __future__ import annotations

import torch

from megatron_sip.model.embedding import embed_into_main_grad


def test_rows_and_their_gradients_are_those_of_autograd() -> None:
    weight = torch.randn(11, 4).bfloat16().requires_grad_()
    weight.main_grad = torch.ones(11, 4)  # type: ignore[attr-defined]
    tokens, direction = torch.tensor([3, 0, 3, 10]), torch.randn(4, 4).bfloat16()
    embedded = embed_into_main_grad(weight, tokens)
    assert torch.equal(embedded, weight[tokens])
    embedded.backward(direction)
    assert weight.grad is None
    expected = 1 + torch.zeros(11, 4).index_add(0, tokens, direction.float())
    assert torch.equal(weight.main_grad, expected)  # type: ignore[attr-defined]


def test_without_gradients_it_is_a_look_up() -> None:
    weight = torch.randn(11, 4).requires_grad_()
    weight.main_grad = torch.zeros(11, 4)  # type: ignore[attr-defined]
    with torch.no_grad():
        embedded = embed_into_main_grad(weight, torch.tensor([1]))
    assert not embedded.requires_grad
