"""Prefix-tree attention against the dense mask and against every branch computed alone with its prefix."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from megatron_sip.kernels.tree_attention.cpu import attention_parts, tree_attention_cpu, tree_attention_merged
from megatron_sip.kernels.tree_attention.dense import token_spans, tree_attention_dense
from megatron_sip.kernels.tree_attention.flex import FlexTreeAttention, RowCache, row_mask, tree_block_mask

HEAD_DIM = 16

groups_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=6)), min_size=1, max_size=3
)
heads_strategy = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])


def make_layout(groups: list[tuple[int, list[int]]]) -> Tensor:
    lines, end = [], 0
    for prefix, branches in groups:
        group_start, prefix_end = end, end + prefix
        end = prefix_end
        for length in branches:
            lines.append([group_start, prefix_end, end, end + length])
            end += length
    return torch.tensor(lines, dtype=torch.int32).reshape(-1, 4)


def make_inputs(length: int, heads: tuple[int, int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, h, HEAD_DIM) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def row_length(layout: Tensor, padding: int = 0) -> int:
    return int(layout[-1, 3]) + padding if len(layout) else padding


def output_and_gradients(attention, inputs: list[Tensor], layout: Tensor, grad: Tensor) -> list[Tensor]:
    output = attention(*inputs, layout, 0.3)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def assert_close(ours: list[Tensor], expected: list[Tensor], relative: float, floor: float = 0.0) -> None:
    """Within `relative` of the largest value, or of `floor` where that is larger."""
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= relative * max(floor, b.abs().max().item())


@settings(max_examples=60, deadline=None)
@given(groups=groups_strategy, heads=heads_strategy, padding=st.integers(0, 5), seed=st.integers(0, 99))
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_dense_mask(dtype, relative, groups, heads, padding, seed):
    layout = make_layout(groups)
    inputs = make_inputs(row_length(layout, padding), heads, dtype, seed)
    grad = torch.randn(inputs[0].shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    assert_close(
        output_and_gradients(tree_attention_merged, inputs, layout, grad),
        output_and_gradients(tree_attention_dense, inputs, layout, grad),
        relative,
        # The inputs' size: gradients of queries and keys are differences of products of such numbers, whose rounding stays
        # where the difference is small (a prefix and a branch of one token).
        floor=1.0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_its_rounding(dtype):
    layout = make_layout([(50, [9, 9, 9, 4]), (7, [3])])
    inputs = make_inputs(row_length(layout, 3), (4, 2), dtype, 1)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ours = output_and_gradients(tree_attention_merged, inputs, layout, grad)
    expected = output_and_gradients(tree_attention_dense, exact, layout, grad.double())
    assert all(tensor.dtype == dtype for tensor in ours)
    assert_close([tensor.double() for tensor in ours], expected, 4 * torch.finfo(dtype).eps)


@settings(max_examples=40, deadline=None)
@given(groups=groups_strategy, heads=heads_strategy, seed=st.integers(0, 99))
def test_equals_branches_computed_alone_with_gradients_summed(groups, heads, seed):
    """Plain causal attention on [prefix; branch], one branch at a time."""
    layout = make_layout(groups)
    inputs = make_inputs(row_length(layout), heads, torch.float64, seed)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    ours = output_and_gradients(tree_attention_merged, inputs, layout, grad)

    total = torch.zeros((), dtype=torch.float64)
    alone = torch.zeros_like(ours[0])
    for line, (group_start, prefix_end, start, end) in enumerate(layout.tolist()):
        index = torch.cat([torch.arange(group_start, prefix_end), torch.arange(start, end)])
        query, key, value = (tensor[index].transpose(0, 1)[None] for tensor in inputs)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.3, enable_gqa=True
        )[0].transpose(0, 1)
        alone[index] = output.detach()
        # The packed row has the prefix's outputs once: only the first branch of a group passes their gradients on.
        first = line == 0 or int(layout[line - 1, 0]) != group_start
        counted = torch.ones(len(index), 1, 1) if first else (index >= prefix_end)[:, None, None]
        total = total + (output * grad[index] * counted).sum()
    assert_close(ours, [alone, *torch.autograd.grad(total, inputs)], 1e-10)


@pytest.mark.parametrize("groups", [[(3, [2, 2, 1])], [(2, [1]), (1, [3, 2])]])
def test_gradcheck(groups):
    layout = make_layout(groups)
    inputs = make_inputs(row_length(layout, 1), (2, 1), torch.float64, 3)
    assert torch.autograd.gradcheck(lambda *qkv: tree_attention_merged(*qkv, layout, 0.3), inputs)


@pytest.mark.parametrize("attention", [tree_attention_merged, tree_attention_dense])
def test_padding_and_filler_rows_are_zero_and_pass_no_gradient(attention):
    layout = make_layout([(4, [3, 2])])
    inputs = make_inputs(row_length(layout, 6), (2, 2), torch.float32, 4)
    results = output_and_gradients(attention, inputs, layout, torch.ones_like(inputs[0]))
    assert all(not tensor[9:].any() for tensor in results)
    assert all(tensor[:9].any() for tensor in results)
    filler = torch.zeros(0, 4, dtype=torch.int32)
    results = output_and_gradients(attention, inputs, filler, torch.ones_like(inputs[0]))
    assert all(not tensor.any() for tensor in results)


def test_strided_inputs_as_megatron_splits_them_from_one_projection():
    layout = make_layout([(11, [5, 5])])
    mixed = torch.randn(row_length(layout), 2, 4, HEAD_DIM, dtype=torch.float64).requires_grad_()
    grad = torch.randn(row_length(layout), 4, HEAD_DIM, dtype=torch.float64)
    results = []
    for attention in (tree_attention_merged, tree_attention_dense):
        query = mixed[:, :, :2].reshape(-1, 4, HEAD_DIM)
        output = attention(query, mixed[:, :, 2], mixed[:, :, 3], layout, 0.3)
        results.append([output.detach(), *torch.autograd.grad(output, [mixed], grad)])
    assert_close(results[0], results[1], 1e-10)


def test_equal_neighbours_share_one_part():
    parts = attention_parts(make_layout([(7, [3, 3, 3, 2])]).tolist())
    assert [(part.batch, part.causal, part.merges) for part in parts] == [
        (1, True, False),
        (1, False, False),
        (3, True, True),
        (1, True, True),
    ]


def test_no_score_is_computed_that_the_tree_does_not_need():
    layout = make_layout([(7, [3, 3, 2]), (4, [1])])
    scores = 0
    for part in attention_parts(layout.tolist()):
        queries, keys = ((end - start) // part.batch for start, end in (part.queries, part.keys))
        scores += part.batch * (queries * (queries + 1) // 2 if part.causal else queries * keys)
    assert scores == 7 * 8 // 2 + 8 * 7 + 6 + 6 + 3 + 4 * 5 // 2 + 4 + 1


def test_second_derivative_is_refused():
    layout = make_layout([(3, [2])])
    inputs = make_inputs(5, (1, 1), torch.float64, 5)
    loss = tree_attention_merged(*inputs, layout, 0.3).square().sum()
    (first,) = torch.autograd.grad(loss, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_private_flash_operators_keep_the_layout_we_rely_on(dtype, causal):
    """lse is [batch, heads, queries] in natural log; the backward takes any lse; key heads may be grouped."""
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(2, 10, 4, HEAD_DIM, generator=generator, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(2, 10, 2, HEAD_DIM, generator=generator, dtype=dtype).transpose(1, 2) for _ in range(2))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=0.3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = 0.3 * query.to(wide) @ key.to(wide).repeat_interleave(2, dim=1).mT
    if causal:
        scores = scores.masked_fill(torch.ones(10, 10).triu(1).bool(), -math.inf)
    assert lse.shape == (2, 4, 10)
    assert lse.dtype == wide
    # torch takes a coarser exp for bfloat16 where it has AVX2 alone: 6.4e-5 there.
    assert (lse - scores.logsumexp(-1)).abs().max() <= (1e-4 if dtype == torch.bfloat16 else 1e-5)
    # An lse larger by log 2 halves every recomputed probability, and with them the value's gradient.
    grad = torch.randn(output.shape, generator=generator, dtype=dtype)
    shifted = (lse + math.log(2)).transpose(1, 2).contiguous().transpose(1, 2)
    grads = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, which, 0.0, causal, scale=0.3
        )
        for which in (lse, shifted)
    ]
    assert [g.shape for g in grads[0]] == [query.shape, key.shape, value.shape]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 4e-2
    assert (grads[0][2] - 2 * grads[1][2]).abs().max() <= tolerance * grads[0][2].abs().max()


def test_flex_attention_block_mask_sees_the_same_tree():
    """FlexAttention runs on GPUs; its eager form has a forward on CPU, which the block mask is checked with."""
    flex = FlexTreeAttention(backend=None)
    for groups in ([(150, [40, 40, 7]), (20, [140])], [(3, [1])]):
        layout = make_layout(groups)
        inputs = [tensor.detach() for tensor in make_inputs(row_length(layout, 9), (4, 2), torch.float32, 7)]
        for _ in range(2):
            output = flex(*inputs, layout.detach(), 0.3)
            assert (output - tree_attention_dense(*inputs, layout, 0.3)).abs().max() <= 1e-5
    filler = flex(*inputs, torch.zeros(0, 4, dtype=torch.int32), 0.3)
    assert not filler.any()


MOST_GRAPHS = 4
"""Three, and one more in a process where something stands in for a GPU, as some tests leave it."""


@torch.no_grad()
@torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True)  # instead of running eagerly
def test_rows_of_any_length_share_a_few_graphs_of_flex_attention():
    """As traced for a GPU. Not through inductor: its C++ for CPUs, which nothing of ours runs, was once wrong on a machine."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    flex = FlexTreeAttention(backend="eager")
    sizes = [
        (70, 3, 33, 5),
        (200, 2, 64, 0),
        (31, 5, 17, 9),
        (500, 2, 90, 11),
        (3, 1, 1, 0),
        (128, 2, 64, 128),
        (257, 16, 12, 1),
    ]
    for prefix, branches, length, padding in sizes:
        layout = make_layout([(prefix, [length] * branches)])
        inputs = [t.detach() for t in make_inputs(row_length(layout, padding), (4, 2), torch.float32, prefix)]
        difference = flex(*inputs, layout, 0.3) - tree_attention_dense(*inputs, layout, 0.3)
        assert difference.abs().max() < 1e-5, (prefix, branches, length, padding)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= MOST_GRAPHS < len(sizes)


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(
        st.tuples(
            st.sampled_from([1, 5, 127, 128, 200, 300]),
            st.lists(st.sampled_from([1, 3, 64, 128, 130]), min_size=1, max_size=4),
        ),
        max_size=4,
    ),
    padding=st.sampled_from([0, 1, 100, 128, 260]),
)
def test_block_mask_is_the_one_that_torch_makes_of_every_score(groups, padding):
    layout = make_layout(groups)
    length = max(row_length(layout, padding), 1)
    ours = tree_block_mask(token_spans(layout, length))
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    for kind, what in product(("kv", "full_kv", "q", "full_q"), ("num_blocks", "indices")):
        assert torch.equal(getattr(ours, f"{kind}_{what}"), getattr(theirs, f"{kind}_{what}")), (kind, what)


def test_a_row_s_mask_is_built_once_for_all_layers_and_models_whatever_rows_come_between():
    masks = RowCache(row_mask, most=3)
    layouts = [make_layout([(3, [2, size])]) for size in (1, 2, 3)]
    first = [masks.of(layout, 16)[0] for layout in layouts]
    again = [masks.of(layout.detach(), 16)[0] for layout in layouts]  # as recomputation passes it
    assert all(one is other for one, other in zip(first, again, strict=True))
    masks.of(make_layout([(3, [2, 4])]), 16)
    assert masks.of(layouts[1], 16)[0] is first[1]
    assert masks.of(layouts[0], 16)[0] is not first[0]
    layouts[1][0, 3] += 1
    assert masks.of(layouts[1], 16)[0] is not first[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_no_more_than_what_attends(dtype):
    """Megatron hands out views of one [q | k | v], of which rotation has replaced queries and keys."""
    layout = make_layout([(30, [8, 8])])
    mixed = torch.randn(row_length(layout), 4 + 2 + 2, HEAD_DIM).to(dtype).requires_grad_()
    query, key, value = mixed.split([4, 2, 2], dim=1)
    output = tree_attention_cpu(query.clone(), key.clone(), value, layout, 0.3)
    floats = [tensor for tensor in output.grad_fn.saved_tensors if tensor.is_floating_point()]
    assert len(floats) == 5  # query, key, value, output, log-sum-exp
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in floats)
    output.sum().backward()
    again = mixed.detach().requires_grad_()
    tree_attention_dense(*again.split([4, 2, 2], dim=1), layout, 0.3).sum().backward()
    assert_close([mixed.grad], [again.grad], 1e-5 if dtype == torch.float32 else 0.03)
