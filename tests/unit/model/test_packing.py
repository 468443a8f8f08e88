"""Packing: every predicted token sees exactly its own prefix and branch, nothing is lost or counted wrong."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sip.kernels.tree_attention.dense import token_spans, visibility
from megatron_sip.model.packing import (
    PackedRow,
    build_row,
    example_lengths,
    moved_together,
    plan_rows,
    split_branches,
)
from megatron_sip.records import Branch, Example

ROW = 48
PAD = -1

lengths_strategy = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 11), min_size=1, max_size=4)), min_size=0, max_size=12
)


def make_examples(lengths: list[tuple[int, list[int]]]) -> list[Example]:
    """Every token id is different, so that ids tell where a token came from."""
    following = iter(range(1_000_000))

    def take(count: int) -> list[int]:
        return [next(following) for _ in range(count)]

    return [
        Example(i, take(prefix), [Branch(take(n), "target", "suffix") for n in branches])
        for i, (prefix, branches) in enumerate(lengths)
    ]


@given(
    prefix=st.integers(1, 60),
    head=st.integers(0, 60),
    branches=st.lists(st.integers(1, 11), min_size=1, max_size=4),
)
def test_a_long_prefix_is_cut_behind_its_head(prefix: int, head: int, branches: list[int]) -> None:
    """The head goes last, and of it the right end; without a cut nothing does."""
    [made] = make_examples([(prefix, branches)])
    head = min(head, prefix)
    example = replace(made, head=head)
    row = build_row([example], [0], ROW, PAD)
    kept = min(prefix, ROW - sum(branches))
    shown = row.tokens[: int(row.layout[0, 1])].tolist()
    assert len(shown) == kept
    assert shown == made.prefix_ids[: min(head, kept)] + made.prefix_ids[prefix - kept + min(head, kept) :]
    assert row.targets.tolist() == build_row([made], [0], ROW, PAD).targets.tolist()


def seen_by(row: PackedRow, position: int) -> list[int]:
    """Token indices that may be attended to from `position`, by walking the layout's definition token by token."""
    seen = []
    for key in range(position + 1):
        for group_start, prefix_end, branch_start, branch_end in row.layout.tolist():
            in_prefix = group_start <= position < prefix_end
            in_branch = branch_start <= position < branch_end
            if (in_prefix and group_start <= key) or (
                in_branch and (group_start <= key < prefix_end or branch_start <= key)
            ):
                seen.append(key)
                break
    return seen


@given(lengths=lengths_strategy, most=st.integers(1, 5))
def test_split_examples_hold_every_branch_once_in_order_and_evenly(lengths, most):
    examples = make_examples(lengths)
    parts = iter(split_branches(examples, most))
    for example in examples:
        pieces = [next(parts) for _ in range(-(-len(example.branches) // most))]
        assert [branch for piece in pieces for branch in piece.branches] == example.branches
        sizes = [len(piece.branches) for piece in pieces]
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1
        assert all(replace(piece, branches=example.branches) == example for piece in pieces)
    assert next(parts, None) is None


@settings(max_examples=150, deadline=None)
@given(lengths=lengths_strategy, replicas=st.integers(1, 4), multiple_of=st.sampled_from([1, 4, 8]))
def test_plan_places_every_example_once_and_accounts_for_every_token(lengths, replicas, multiple_of):
    plan = plan_rows(lengths, ROW, replicas, multiple_of=multiple_of)
    sizes = [min(prefix + sum(branches), ROW) for prefix, branches in lengths]
    rows = [row for replica in plan.rows for row in replica]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert len(plan.rows) == replicas
    assert {len(replica) for replica in plan.rows} == {plan.micro_batches}
    loads = [sum(sizes[index] for index in row) for row in rows]
    assert plan.row_length == max(multiple_of, -(-max(loads) // multiple_of) * multiple_of) <= ROW
    assert plan.tokens == sum(sizes)
    assert plan.padding == sum(plan.row_length - load for load in loads)
    assert rows.count(()) == max(0, len(rows) - len(lengths))
    cuts = [max(0, prefix + sum(branches) - ROW) for prefix, branches in lengths]
    assert plan.cut_tokens == sum(cuts)
    assert plan.unshared_tokens == sum(
        prefix - cut + n for (prefix, branches), cut in zip(lengths, cuts, strict=True) for n in branches
    )
    assert plan == plan_rows(list(lengths), ROW, replicas, multiple_of=multiple_of)


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_strategy, replicas=st.integers(1, 3))
def test_every_target_is_predicted_from_exactly_its_prefix_and_branch(lengths, replicas):
    examples = make_examples(lengths)
    plan = plan_rows(example_lengths(examples), ROW, replicas)
    trained: dict[tuple[int, int], list[int]] = {}
    for indices in (row for replica in plan.rows for row in replica):
        row = build_row(examples, indices, plan.row_length, PAD)
        assert row.tokens.shape == row.position_ids.shape == (plan.row_length,)
        tokens, positions = row.tokens.tolist(), row.position_ids.tolist()
        keys = [(e, b) for e in indices for b in range(len(examples[e].branches))]
        for branch, key in enumerate(keys):
            example = examples[key[0]]
            start, end = row.branch_offsets[branch : branch + 2].tolist()
            trained[key] = row.targets[start:end].tolist()
            cut = max(0, lengths[key[0]][0] + sum(lengths[key[0]][1]) - ROW)
            for place in range(start, end):
                seen = seen_by(row, int(row.predictor_positions[row.logit_rows[place]]))
                context = example.prefix_ids[cut:] + example.branches[key[1]].ids[: place - start]
                assert [tokens[index] for index in seen] == context
                assert [positions[index] for index in seen] == list(range(len(context)))
    assert trained == {(e, b): branch.ids for e, x in enumerate(examples) for b, branch in enumerate(x.branches)}


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_strategy)
def test_rows_hold_each_token_once_and_predicting_states_are_unique(lengths):
    examples = make_examples(lengths)
    plan = plan_rows(example_lengths(examples), ROW, 1)
    held: list[int] = []
    for indices in plan.rows[0]:
        row = build_row(examples, indices, plan.row_length, PAD)
        held += [token for token in row.tokens.tolist() if token != PAD]
        hidden = row.predictor_positions.tolist()
        assert hidden == sorted(set(hidden))
        assert set(row.logit_rows.tolist()) == set(range(len(hidden)))
        assert len(hidden) == sum(1 - len(lengths[i][1]) + sum(lengths[i][1]) for i in indices)
        end = int(row.layout[-1, 3]) if indices else 0
        assert row.tokens[end:].eq(PAD).all()
        assert row.position_ids[end:].eq(0).all()
    expected = [
        token
        for example, (prefix, branches) in zip(examples, lengths, strict=True)
        for token in example.prefix_ids[max(0, prefix + sum(branches) - ROW) :]
        + [token for branch in example.branches for token in branch.ids]
    ]
    assert sorted(held) == sorted(expected)


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_strategy)
def test_visibility_of_all_token_pairs_follows_the_definition(lengths):
    examples = make_examples(lengths)
    for indices in plan_rows(example_lengths(examples), ROW, 1).rows[0]:
        row = build_row(examples, indices, ROW, PAD)
        spans = token_spans(row.layout, ROW)
        matrix = visibility(spans)
        for position in range(ROW):
            padding = int(row.tokens[position]) == PAD
            assert bool(spans.inside[position]) is not padding
            expected = [position] if padding else seen_by(row, position)
            assert matrix[position].nonzero()[:, 0].tolist() == expected


def test_shared_prefix_is_projected_once_for_all_branches():
    examples = make_examples([(3, [2, 1])])
    row = build_row(examples, [0], 8, PAD)
    assert row.tokens.tolist() == [0, 1, 2, 3, 4, 5, PAD, PAD]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert row.layout.tolist() == [[0, 3, 3, 5], [0, 3, 5, 6]]
    assert row.predictor_positions.tolist() == [2, 3]
    assert row.logit_rows.tolist() == [0, 1, 0]
    assert row.targets.tolist() == [3, 4, 5]
    assert row.branch_offsets.tolist() == [0, 2, 3]
    assert (row.examples, row.branches) == ((examples[0],), tuple(examples[0].branches))


def test_rows_are_evened_out_over_replicas():
    """Best fit would fill one row with three examples and leave the fourth replica a filler."""
    plan = plan_rows([(10, [5])] * 6, 48, 4)
    assert sorted(len(row) for replica in plan.rows for row in replica) == [1, 1, 2, 2]
    assert plan.row_length == 30


def test_best_fit_fills_rows_where_spreading_would_overflow():
    """Two rows of ten exactly: 6 + 4 and 3 + 3 + 2 + 2; evening out (6 + 3 + 2, 4 + 3 + 2) would need eleven."""
    plan = plan_rows([(5, [1]), (3, [1]), (2, [1]), (2, [1]), (1, [1]), (1, [1])], 10, 1)
    assert plan.micro_batches == 2
    assert plan.padding == 0


def test_long_prefix_loses_its_left_end():
    examples = make_examples([(30, [4, 4])])
    plan = plan_rows(example_lengths(examples), 16, 1)
    row = build_row(examples, plan.rows[0][0], plan.row_length, PAD)
    assert (plan.cut_tokens, plan.row_length) == (22, 16)
    assert row.tokens[:8].tolist() == examples[0].prefix_ids[22:]
    assert row.position_ids[:8].tolist() == list(range(8))


def test_filler_row_has_no_branch():
    plan = plan_rows([(3, [2])], 8, 2)
    assert plan.rows == (((0,),), ((),))
    row = build_row([], (), plan.row_length, 7)
    assert row.tokens.tolist() == [7] * 5
    assert row.layout.shape == (0, 4)
    assert [t.shape[0] for t in (row.predictor_positions, row.logit_rows, row.targets, row.branch_offsets)] == [
        0,
        0,
        0,
        1,
    ]
    assert row.layout.dtype == torch.int32


def test_no_examples_give_one_filler_a_replica():
    plan = plan_rows([], 8, 3, multiple_of=4)
    assert plan.rows == (((),), ((),), ((),))
    assert (plan.row_length, plan.tokens, plan.padding) == (4, 0, 12)


def test_row_moves_to_a_device_with_everything_in_it():
    examples = make_examples([(3, [2, 1])])
    row = build_row(examples, [0], 8, PAD)
    moved = row.to("meta")
    for old, new in ((row, moved), (row.facts, moved.facts)):
        for field in fields(old):
            before, after = getattr(old, field.name), getattr(new, field.name)
            if isinstance(before, torch.Tensor):
                assert (after.device.type, after.dtype, after.shape) == ("meta", before.dtype, before.shape), field.name
    assert moved.examples == (examples[0],)
    assert row.to("cpu") is row


@settings(deadline=None)
@given(lengths=lengths_strategy)
def test_what_is_moved_together_arrives_unchanged(lengths):
    row = build_row(make_examples(lengths), range(len(lengths)), 60 * 12 + 44 * 12, PAD)
    tensors = [row.tokens, row.layout, row.targets, row.facts.engine_logprobs, row.facts.pairs, row.branch_offsets]
    moved = moved_together(tensors, torch.device("cpu"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    for before, after in zip(tensors, moved, strict=True):
        assert after.dtype == before.dtype
        assert after.is_contiguous()
        assert torch.equal(after.nan_to_num(7.0), before.nan_to_num(7.0))


def test_facts_are_those_of_the_branches_in_order():
    made = [
        Example(0, [1], [Branch([2, 3], "rejected", "suffix"), Branch([4], "chosen", "rollout", 0.5, [-1.0])]),
        Example(
            1, [1], [Branch([5], "target", "rollout", -0.5), Branch([6, 7], "target", "rewrite", None, [-2.0, -3.0])]
        ),
        Example(2, [1], [Branch([8], "chosen", "rollout"), Branch([9], "rejected", "suffix")]),
    ]
    facts = build_row(made, [2, 0, 1], 20, PAD).facts
    assert facts.pairs.tolist() == [[0, 1], [3, 2]]
    assert facts.advantages.nan_to_num(9.0).tolist() == [9.0, 9.0, 9.0, 0.5, -0.5, 9.0]
    assert facts.engine_logprobs.nan_to_num(9.0).tolist() == [9.0, 9.0, 9.0, 9.0, -1.0, 9.0, -2.0, -3.0]
    assert facts.engine_entries.tolist() == [4, 6, 7]
    assert facts.rollout_entries.tolist() == [0, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(0, [3])], 8, 1), "example 0 has an empty prefix"),
        (([(3, [3]), (3, [2, 0])], 8, 1), r"example 1 has branch lengths \[2, 0\]"),
        (([(3, [])], 8, 1), r"example 0 has branch lengths \[\]"),
        (([(3, [4, 4])], 8, 1), r"branches take 8 tokens, a row holds 8.*--seq-length"),
        (([], 8, 0), "num_replicas is 0"),
        (([], 0, 1), "row_length is 0"),
    ],
)
def test_bad_lengths_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_rows(*arguments)


def test_row_length_is_rounded_up_to_the_multiple():
    """A prefix is cut to the rounded length, which is the length that `build_row` gets."""
    examples = make_examples([(30, [4])])
    plan = plan_rows(example_lengths(examples), 13, 1, multiple_of=8)
    assert (plan.row_length, plan.cut_tokens, plan.padding) == (16, 18, 0)
    assert build_row(examples, plan.rows[0][0], plan.row_length, PAD).tokens[0] == 18


def test_examples_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"examples \[0, 1\] take 10 tokens, more than the row's 8"):
        build_row(make_examples([(3, [2]), (3, [2])]), [0, 1], 8, PAD)
