"""Tree attention by variable-length flash attention, with its two operators emulated on a CPU: a GPU has them."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sip.kernels.tree_attention.dense import tree_attention_dense

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
HEADS, GROUPS, SIZE, SCALE = 4, 2, 8, 0.3


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("attention_flash")


def softmax_of(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """[H, Q, K] scores."""
    scores = SCALE * torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(HEADS // GROUPS, 1))
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf) if causal else scores


def forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, causal: bool, scale: float
) -> Any:
    """As flash attention: sequences without keys give 0 and an infinite log-sum-exp."""
    output, lse = torch.zeros_like(query), torch.full(query.shape[:2], torch.inf, dtype=query.dtype).T.contiguous()
    for (q0, q1), (k0, k1) in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        if k1 > k0 and q1 > q0:
            scores = softmax_of(query[q0:q1], key[k0:k1], causal)
            values = value[k0:k1].repeat_interleave(HEADS // GROUPS, 1)
            output[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            lse[:, q0:q1] = scores.logsumexp(-1)
    return output, lse


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, queries: Tensor, keys: Tensor,
    causal: bool, scale: float,
) -> Any:  # fmt: skip
    """As flash attention: probabilities from the given log-sum-exp; what no sequence holds is left as it was, here NaN."""
    grads = [torch.full_like(tensor, torch.nan) for tensor in (query, key, value)]
    for (q0, q1), (k0, k1) in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        if k1 == k0 or q1 == q0:
            continue
        probabilities = (softmax_of(query[q0:q1], key[k0:k1], causal) - lse[:, q0:q1, None]).exp()
        values = value[k0:k1].repeat_interleave(HEADS // GROUPS, 1)
        of_probabilities = torch.einsum("qhd,khd->hqk", grad[q0:q1], values)
        dots = (grad[q0:q1] * output[q0:q1]).sum(-1).T[:, :, None]
        of_scores = SCALE * probabilities * (of_probabilities - dots)
        grads[0][q0:q1] = torch.einsum("hqk,khd->qhd", of_scores, key[k0:k1].repeat_interleave(HEADS // GROUPS, 1))
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, query[q0:q1])
        of_values = torch.einsum("hqk,qhd->khd", probabilities, grad[q0:q1])
        for kept, part in zip(grads[1:], (of_keys, of_values), strict=True):
            kept[k0:k1] = part.unflatten(1, (GROUPS, HEADS // GROUPS)).sum(2)
    return grads


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=0, max_size=3
    ),
    padding=st.integers(0, 4),
)
def test_equals_the_dense_mask(flash: ModuleType, groups: list[tuple[int, list[int]]], padding: int) -> None:
    lines, end = [], 0
    for prefix, branches in groups:
        start, end = end, end + prefix
        prefix_end = end
        for size in branches:
            lines.append([start, prefix_end, end, end + size])
            end += size
    layout = torch.tensor(lines, dtype=torch.int32).reshape(-1, 4)
    length = max(1, end + padding)
    inputs = [
        torch.randn(length, heads, SIZE, dtype=torch.float64).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)
    ]
    grad = torch.randn(length, HEADS, SIZE, dtype=torch.float64)
    results = []
    for attention in (flash.FlashTreeAttention(forward, backward), tree_attention_dense):
        output = attention(*inputs, layout, SCALE)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, grad)])
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)
