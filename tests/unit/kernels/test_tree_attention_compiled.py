"""The compiled bfloat16 kernels of prefix-tree attention, against float64 and the dense mask.

They run on processors with AVX-512 BF16; on others the operators must say so, and attention take torch's way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree_attention import make_layout
from torch import Tensor

from megatron_sip.kernels.tree_attention.compiled import (
    KERNELS_USABLE,
    compiled_kernels_apply,
    tree_attention_compiled,
)
from megatron_sip.kernels.tree_attention.cpu import tree_attention_cpu, tree_attention_merged
from megatron_sip.kernels.tree_attention.dense import tree_attention_dense

ATTENTIONS = [tree_attention_cpu, tree_attention_merged, *([tree_attention_compiled] if KERNELS_USABLE else [])]
EPS = torch.finfo(torch.bfloat16).eps  # torch's own kernels round more often than ours

# Lengths around the kernels' blocks of 64 tokens.
lengths = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 128, 150]))
groups_strategy = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=4)), min_size=1, max_size=3)


def make_inputs(length: int, heads: tuple[int, int], dim: int, seed: int = 0) -> list[Tensor]:
    """query, key, value and an output gradient, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, h, dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def run(attention, inputs: list[Tensor], layout: Tensor, scale: float) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    output = attention(*leaves, layout, scale)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]


def assert_close_to_float64(attention, inputs: list[Tensor], layout: Tensor, scale: float) -> None:
    ours = run(attention, inputs, layout, scale)
    expected = run(tree_attention_dense, [tensor.double() for tensor in inputs], layout, scale)
    tolerance = (2 if attention is tree_attention_compiled else 4) * EPS
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.bfloat16
        # Gradients of scores are differences of terms of size 1, each rounded: a small one is not relatively exact.
        assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(max_examples=40, deadline=None)
@given(
    groups=groups_strategy,
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    dim=st.sampled_from([16, 32, 48, 64, 80, 128]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_is_as_close_to_float64_as_bfloat16_allows(attention, groups, heads, dim, padding, seed):
    layout = make_layout(groups)
    inputs = make_inputs(int(layout[-1, 3]) + padding, heads, dim, seed)
    assert_close_to_float64(attention, inputs, layout, dim**-0.5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_large_scores_neither_overflow_nor_vanish(attention):
    layout = make_layout([(70, [30, 5])])
    inputs = make_inputs(int(layout[-1, 3]), (2, 2), 64)
    inputs[0] = inputs[0] * 40
    assert_close_to_float64(attention, inputs, layout, 0.125)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_and_filler_rows_are_zero_and_pass_no_gradient(attention):
    layout = make_layout([(4, [3, 2])])
    inputs = make_inputs(80, (2, 1), 32)
    results = run(attention, inputs, layout, 0.2)
    assert all(not tensor[9:].any() for tensor in results)
    assert all(tensor[:9].any() for tensor in results)
    filler = torch.zeros(0, 4, dtype=torch.int32)
    assert all(not tensor.any() for tensor in run(attention, inputs, filler, 0.2))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_strided_inputs_as_megatron_splits_them_from_one_projection(attention):
    layout = make_layout([(70, [9])])
    mixed = torch.randn(79, 2, 4, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    views = [mixed[:, :, :2].flatten(1, 2), mixed[:, :, 2], mixed[:, :, 3]]
    strided = attention(*views, layout, 0.2)
    assert torch.equal(strided, attention(*(view.contiguous() for view in views), layout, 0.2))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_result_does_not_depend_on_the_number_of_threads(attention):
    layout = make_layout([(100, [64, 30]), (20, [10])])
    inputs = make_inputs(int(layout[-1, 3]), (6, 2), 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(run(attention, inputs, layout, 0.125))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_token_that_is_not_finite_is_not_hidden(attention):
    layout = make_layout([(5, [3])])
    inputs = make_inputs(8, (1, 1), 16)
    inputs[1][2] = float("nan")
    output = attention(*inputs[:3], layout, 0.25)
    assert output[:2].isfinite().all()
    assert output[2:].isnan().all()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [(5, [3]), (65, [1, 31]), (64, [63, 129]), (66, [32, 2])])
def test_what_is_not_finite_stays_in_its_group(attention, value, lengths):
    layout = make_layout([lengths, (3, [4])])
    end = lengths[0] + sum(lengths[1])
    inputs = make_inputs(end + 7, (2, 1), 32)
    clean = run(attention, inputs, layout, 0.2)
    for tensor in inputs:
        tensor[end:] = value
    poisoned = run(attention, inputs, layout, 0.2)
    assert not poisoned[0][end:].isfinite().any()
    assert all(torch.equal(a[:end], b[:end]) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_is_not_finite_stays_in_its_branch(attention):
    layout = make_layout([(67, [5, 70, 3])])
    inputs = make_inputs(67 + 78, (2, 1), 32)
    clean = attention(*inputs[:3], layout, 0.2)
    for tensor in inputs[:3]:
        tensor[72:142] = float("nan")
    output = attention(*inputs[:3], layout, 0.2)
    assert torch.equal(output[:72], clean[:72])
    assert torch.equal(output[142:], clean[142:])


def test_only_bfloat16_and_suitable_head_sizes_take_the_kernels():
    assert compiled_kernels_apply(torch.zeros(1, 1, 64, dtype=torch.bfloat16)) is KERNELS_USABLE
    assert not compiled_kernels_apply(torch.zeros(1, 1, 64))
    assert not compiled_kernels_apply(torch.zeros(1, 1, 24, dtype=torch.bfloat16))
    layout = make_layout([(5, [3])])
    assert_close_to_float64(tree_attention_cpu, make_inputs(8, (2, 1), 24), layout, 0.2)


def refusals() -> list[tuple[list[Tensor], Tensor, type[Exception], str]]:
    query, key, value, _ = make_inputs(8, (2, 1), 16)
    layout = make_layout([(5, [3])])
    if not KERNELS_USABLE:
        return [([query, key, value], layout, (RuntimeError, AttributeError), "bfloat16 instructions|no attribute")]
    return [
        ([query[:7], key[:7], value[:7]], layout, ValueError, r"line 0 .* \[0, 5, 5, 8\] in a row of 7 tokens"),
        ([query.float(), key, value], layout, TypeError, "must be bfloat16, got Float, BFloat16, BFloat16"),
        ([query, key[:, :, :8], value[:, :, :8]], layout, ValueError, r"H a multiple of G, got \[8, 2, 16\]"),
        ([query[:, :, :8], key[:, :, :8], value[:, :, :8]], layout, ValueError, "multiple of 16, got 8"),
        ([query, key, value], layout[:, :3], ValueError, r"layout must be \[B, 4\], got \[1, 3\]"),
    ]


@pytest.mark.parametrize(("inputs", "layout", "error", "message"), refusals())
def test_bad_inputs_are_refused_by_name(inputs, layout, error, message):
    with pytest.raises(error, match=message):
        tree_attention_compiled(*inputs, layout, 0.2)


# Lines that no thread could write without another writing the same.
OVERLAPS = [
    [[0, 3, 3, 6], [0, 3, 3, 6]],
    [[0, 3, 3, 6], [0, 3, 5, 7]],
    [[0, 3, 5, 7], [0, 3, 3, 5]],
    [[0, 3, 3, 6], [0, 2, 6, 8]],
    [[0, 3, 3, 6], [5, 6, 6, 8]],
    [[4, 5, 5, 8], [0, 2, 2, 4]],
    [[0, 1, 1, 2], [2, 3, 3, 4], [0, 1, 4, 5]],
]


@pytest.mark.parametrize("lines", OVERLAPS if KERNELS_USABLE else [])
def test_overlapping_branches_and_groups_are_refused(lines):
    query, key, value, grad = make_inputs(8, (2, 1), 16)
    message = rf"line {len(lines) - 1} of the layout, \[{', '.join(map(str, lines[-1]))}\], overlaps the line before it"
    layout = torch.tensor(lines, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        tree_attention_compiled(query, key, value, layout, 0.2)
    lse = torch.zeros(8, 2)
    with pytest.raises(ValueError, match=message):
        torch.ops.megatron_sip.tree_attention_backward(grad, query, key, value, query, lse, layout, 0.2)


@pytest.mark.skipif(not KERNELS_USABLE, reason="needs AVX-512 BF16")
def test_gaps_between_branches_and_groups_change_nothing_and_stay_zero():
    layout = torch.tensor([[1, 4, 5, 8], [1, 4, 9, 11], [12, 14, 14, 16]], dtype=torch.int32)
    gaps = torch.tensor([0, 4, 8, 11, 16])
    covered = torch.tensor([token for token in range(17) if token not in gaps])
    inputs = make_inputs(17, (2, 1), 16)
    results = run(tree_attention_compiled, inputs, layout, 0.25)
    without = make_layout([(3, [3, 2]), (2, [2])])
    expected = run(tree_attention_compiled, [tensor[covered] for tensor in inputs], without, 0.25)
    assert all(not tensor[gaps].any() for tensor in results)
    assert all(torch.equal(a[covered], b) for a, b in zip(results, expected, strict=True))


def backward_refusals() -> list[tuple[int, Callable[[Tensor], Tensor], type[Exception], str]]:
    return [
        (0, lambda grad: grad.float(), TypeError, "grad and out must be bfloat16, got Float and BFloat16"),
        (0, lambda grad: grad[:7], ValueError, r"shape of query, \[8, 2, 16\], got \[7, 2, 16\] and \[8, 2, 16\]"),
        (1, lambda query: query[:7], ValueError, r"G, D\] with H a multiple of G, got \[7, 2, 16\]"),
        (4, lambda out: out.double(), TypeError, "grad and out must be bfloat16, got BFloat16 and Double"),
        (4, lambda out: out[:, :1], ValueError, r"got \[8, 2, 16\] and \[8, 1, 16\]"),
        (5, lambda lse: lse.double(), TypeError, "lse must be float32, got Double"),
        (5, lambda lse: lse.T, ValueError, r"lse must be \[8, 2\], got \[2, 8\]"),
    ]


@pytest.mark.parametrize(("position", "change", "error", "message"), backward_refusals() if KERNELS_USABLE else [])
def test_bad_inputs_of_the_backward_operator_are_refused(position, change, error, message):
    layout = make_layout([(5, [3])])
    query, key, value, grad = make_inputs(8, (2, 1), 16)
    arguments = [grad, query, key, value, *torch.ops.megatron_sip.tree_attention(query, key, value, layout, 0.2)]
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=message):
        torch.ops.megatron_sip.tree_attention_backward(*arguments, layout, 0.2)


@pytest.mark.skipif(not KERNELS_USABLE, reason="needs AVX-512 BF16")
def test_the_backward_operator_reads_views_through_their_strides():
    layout = make_layout([(5, [3])])
    query, key, value, grad = make_inputs(8, (2, 1), 16)
    out, lse = torch.ops.megatron_sip.tree_attention(query, key, value, layout, 0.2)
    expected = torch.ops.megatron_sip.tree_attention_backward(grad, query, key, value, out, lse, layout, 0.2)
    arguments = [tensor.mT.contiguous().mT for tensor in (grad, query, key, value, out, lse)]
    results = torch.ops.megatron_sip.tree_attention_backward(*arguments, layout, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("operator", ["tree_attention", "tree_attention_backward"] if KERNELS_USABLE else [])
def test_operators_keep_their_schema_and_have_shape_functions(operator):
    layout = make_layout([(5, [3])])
    query, key, value, grad = make_inputs(8, (2, 1), 16)
    inputs: tuple = (query, key, value)
    if operator == "tree_attention_backward":
        inputs = (grad, *inputs, *torch.ops.megatron_sip.tree_attention(*inputs, layout, 0.2))
    torch.library.opcheck(
        getattr(torch.ops.megatron_sip, operator),
        (*inputs, layout, 0.2),
        test_utils=("test_schema", "test_faketensor"),
    )
