"""Packed prefix trees: several examples in one row, each prefix stored once and shared by its branches.

    row:  [ prefix 0 | branch 0.0 | branch 0.1 ][ prefix 1 | branch 1.0 ] ... padding
           <------------- group 0 ------------><------- group 1 ------->

A row is one micro-batch. `plan_rows` decides which examples share a row (from their lengths alone, so every rank that
knows the lengths computes the same plan without talking), `build_row` lays the tokens out. Everything here is pure
and on the CPU. See docs/packing.md for a drawing of the attention that goes with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_sip.records import Branch, Example

Lengths = tuple[int, Sequence[int]]
"""(prefix length, branch lengths) of one example, in tokens."""

ROW_MULTIPLE = {"cpu": 16, "cuda": 128}
"""What row lengths are rounded up to: on a GPU to whole blocks of attention's mask and of matrix products."""


@dataclass(frozen=True, slots=True)
class BranchFacts:
    """A row's roles, advantages and log-probs for its loss, laid out with the row so that a GPU is handed them in one copy.

    pairs: int64 [P, 2], the chosen and the rejected branch of each example that is such a pair.
    advantages: float64 [B], a branch's advantage, NaN for one without.
    engine_logprobs: float64 [L], what the engine thought of the targets, NaN for those that it did not sample.
    engine_entries, rollout_entries: int64 [K] and [R], which of the L targets have an engine log-prob, and which are rollouts'.
    """

    pairs: Tensor
    advantages: Tensor
    engine_logprobs: Tensor
    engine_entries: Tensor
    rollout_entries: Tensor


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One micro-batch: S tokens, B branches, L predicted tokens, T hidden states that predict at least one of them.

    tokens: int64 [S], padded with the pad id.
    position_ids: int64 [S]; every branch restarts at the length of its prefix; padding is 0.
    layout: int32 [B, 4], a line per branch: group_start, prefix_end, branch_start, branch_end (token indices in the row,
        ends exclusive); the branches of a group follow its prefix without gaps, groups follow each other without gaps.
    predictor_positions: int64 [T], increasing positions whose logits predict branch tokens: the last prefix token (once for
        all branches) and the branch tokens but the last.
    logit_rows: int64 [L], for each predicted token its index into predictor_positions.
    targets: int64 [L], the predicted token ids: the branches' tokens in layout order.
    branch_offsets: int64 [B + 1]; branch b owns entries branch_offsets[b]:branch_offsets[b + 1] of the L.
    facts: what the loss needs of the branches, as tensors; examples: what they were made of, in layout order.
    """

    tokens: Tensor
    position_ids: Tensor
    layout: Tensor
    predictor_positions: Tensor
    logit_rows: Tensor
    targets: Tensor
    branch_offsets: Tensor
    facts: BranchFacts
    examples: tuple[Example, ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The B branches in layout order."""
        return tuple(branch for example in self.examples for branch in example.branches)

    def to(self, device: torch.device | str) -> PackedRow:
        """The same row with its tensors on `device`, where they are views of one buffer: one copy, which no one waits for."""
        device = torch.device(device)
        if device == self.tokens.device:
            return self
        own = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        facts = [f.name for f in fields(self.facts)]
        tensors = [*(getattr(self, name) for name in own), *(getattr(self.facts, name) for name in facts)]
        moved = iter(moved_together(tensors, device))
        changed: dict[str, Any] = dict(zip(own, moved, strict=False))  # the first of them
        return replace(self, **changed, facts=BranchFacts(*moved))


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which examples go into which micro-batch of which data-parallel replica, and what that costs.

    rows: rows[replica][micro_batch] are example indices; every replica has the same number of micro-batches; an empty
        tuple is a filler, present only when there are fewer examples than rows needed.
    row_length: the length that every row of the step is padded to (pipeline stages exchange equal shapes).
    tokens: tokens placed, after cutting, without padding.
    padding: tokens of padding over all rows of all replicas.
    unshared_tokens: what the same examples take when each branch is stored with its own copy of the prefix.
    cut_tokens: tokens removed from the left ends of prefixes that were too long.
    """

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    row_length: int
    tokens: int
    padding: int
    unshared_tokens: int
    cut_tokens: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches per replica."""
        return len(self.rows[0])


def plan_rows(lengths: Sequence[Lengths], row_length: int, num_replicas: int, *, multiple_of: int = 1) -> RowPlan:
    """Assign examples to rows of at most `row_length` tokens, rounded up, the same number of rows on every replica.

    Best-fit decreasing finds the number of rows, which is rounded up to a multiple of `num_replicas`; the examples are
    then spread evenly over that many rows, so that the common length, that of the longest row, is small. Lengths are
    rounded up to `multiple_of` (tensor-parallel size under sequence parallelism, vector widths). An example is never
    split here. Deterministic in its arguments.

    Raises:
        ValueError: a bad row_length, num_replicas or multiple_of, an empty prefix or branch, or branches that leave no
            room for a single prefix token.
    """
    _check_plan_arguments(row_length, num_replicas, multiple_of)
    row_length = _round_up(row_length, multiple_of)
    cuts = [_prefix_cut(index, prefix, branches, row_length) for index, (prefix, branches) in enumerate(lengths)]
    sizes = [prefix - cut + sum(branches) for (prefix, branches), cut in zip(lengths, cuts, strict=True)]
    rows = _balanced_rows(sizes, row_length, num_replicas)
    loads = [sum(sizes[index] for index in row) for row in rows]
    common = max(_round_up(max(loads), multiple_of), multiple_of)
    return RowPlan(
        rows=_deal(rows, loads, num_replicas),
        row_length=common,
        tokens=sum(sizes),
        padding=common * len(rows) - sum(sizes),
        unshared_tokens=sum(
            sum(prefix - cut + n for n in branches) for (prefix, branches), cut in zip(lengths, cuts, strict=True)
        ),
        cut_tokens=sum(cuts),
    )


def example_lengths(examples: Sequence[Example]) -> list[Lengths]:
    """What `plan_rows` needs to know of the examples."""
    return [(len(example.prefix_ids), [len(branch.ids) for branch in example.branches]) for example in examples]


def split_branches(examples: Sequence[Example], most: int) -> list[Example]:
    """The same branches in examples of at most `most`, as even as can be, each with its own copy of the prefix.

    For objectives whose loss is a sum over branches (GRPO, NLL): neither loss nor gradient change.
    """
    parts = []
    for example in examples:
        count = len(example.branches)
        pieces = -(-count // most)
        cuts = [count * piece // pieces for piece in range(pieces + 1)]
        parts += [replace(example, branches=example.branches[first:last]) for first, last in itertools.pairwise(cuts)]
    return parts


def build_row(examples: Sequence[Example], indices: Sequence[int], row_length: int, pad_id: int) -> PackedRow:
    """Lay out `examples[i] for i in indices` in one row of exactly `row_length` tokens.

    An example longer than the row loses the left end of its prefix behind its head (as `plan_rows` counted it). No
    indices give a filler row: B = T = L = 0.

    Raises:
        ValueError: the examples do not fit, or one has an empty prefix or branch.
    """
    tokens: list[int] = []
    positions: list[int] = []
    layout: list[list[int]] = []
    hidden: list[int] = []
    logit_rows: list[int] = []
    targets: list[int] = []
    for index in indices:
        example = examples[index]
        cut = _prefix_cut(index, len(example.prefix_ids), [len(branch.ids) for branch in example.branches], row_length)
        prefix = _cut_prefix(example, cut)
        group_start, prefix_end = len(tokens), len(tokens) + len(prefix)
        tokens += prefix
        positions += range(len(prefix))
        shared_row = len(hidden)
        hidden.append(prefix_end - 1)
        for branch in example.branches:
            start, end = len(tokens), len(tokens) + len(branch.ids)
            tokens += branch.ids
            positions += range(len(prefix), len(prefix) + len(branch.ids))
            layout.append([group_start, prefix_end, start, end])
            logit_rows.append(shared_row)
            logit_rows += range(len(hidden), len(hidden) + len(branch.ids) - 1)
            hidden += range(start, end - 1)
            targets += branch.ids
    if len(tokens) > row_length:
        raise ValueError(f"examples {list(indices)} take {len(tokens)} tokens, more than the row's {row_length}")
    padding = row_length - len(tokens)
    lengths = [0] + [line[3] - line[2] for line in layout]
    return PackedRow(
        tokens=torch.tensor(tokens + [pad_id] * padding, dtype=torch.int64),
        position_ids=torch.tensor(positions + [0] * padding, dtype=torch.int64),
        layout=torch.tensor(layout, dtype=torch.int32).reshape(-1, 4),
        predictor_positions=torch.tensor(hidden, dtype=torch.int64),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        branch_offsets=torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        facts=branch_facts([examples[index] for index in indices]),
        examples=tuple(examples[index] for index in indices),
    )


def branch_facts(examples: Sequence[Example]) -> BranchFacts:
    """The facts of a row that holds the branches of these examples in order."""
    pairs: list[list[int]] = []
    engine_logprobs: list[float] = []
    engine_entries: list[int] = []
    rollout_entries: list[int] = []
    first = 0
    for example in examples:
        roles = [branch.role for branch in example.branches]
        if sorted(roles) == ["chosen", "rejected"]:
            pairs.append([first + roles.index("chosen"), first + roles.index("rejected")])
        first += len(roles)
        for branch in example.branches:
            entries = range(len(engine_logprobs), len(engine_logprobs) + len(branch.ids))
            rollout_entries += entries if branch.kind == "rollout" else ()
            engine_entries += entries if branch.engine_logprobs is not None else ()
            engine_logprobs += branch.engine_logprobs or [math.nan] * len(branch.ids)
    advantages = [branch.advantage for example in examples for branch in example.branches]
    return BranchFacts(
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        advantages=torch.tensor([math.nan if a is None else a for a in advantages], dtype=torch.float64),
        engine_logprobs=torch.tensor(engine_logprobs, dtype=torch.float64),
        engine_entries=torch.tensor(engine_entries, dtype=torch.int64),
        rollout_entries=torch.tensor(rollout_entries, dtype=torch.int64),
    )


def moved_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on `device` of contiguous tensors on the CPU, each of whole 8-byte words: views of one buffer.

    With CUDA the buffer comes from pinned memory, so that the copy needs no synchronisation.
    """
    words = [tensor.reshape(-1).view(torch.int64) for tensor in tensors]
    sizes = [len(word) for word in words]
    staged = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=torch.cuda.is_available())
    moved = torch.cat(words, out=staged).to(device, non_blocking=True)
    return [
        piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(moved.split(sizes), tensors, strict=True)
    ]


def _cut_prefix(example: Example, cut: int) -> list[int]:
    """The prefix without `cut` tokens at its left but for its head, of which only goes what all else does not make up."""
    head = min(example.head, len(example.prefix_ids) - cut)
    return [*example.prefix_ids[:head], *example.prefix_ids[head + cut :]]


def _check_plan_arguments(row_length: int, num_replicas: int, multiple_of: int) -> None:
    if num_replicas < 1:
        raise ValueError(f"num_replicas is {num_replicas}, must be at least 1")
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}, must be at least 1")
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}, must be at least 1")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _prefix_cut(index: int, prefix: int, branches: Sequence[int], row_length: int) -> int:
    """Tokens to remove from the left of example `index`'s prefix so that it fits in a row of its own."""
    if prefix < 1:
        raise ValueError(f"example {index} has an empty prefix: nothing would predict its branches' first tokens")
    if not branches or min(branches) < 1:
        raise ValueError(f"example {index} has branch lengths {list(branches)}: needs at least one, none of them empty")
    if sum(branches) >= row_length:
        raise ValueError(
            f"example {index}: its branches take {sum(branches)} tokens, a row holds {row_length}, of which one is for "
            "the prefix; raise the row length (--seq-length) or train on fewer or shorter branches"
        )
    return max(0, prefix + sum(branches) - row_length)


def _balanced_rows(sizes: Sequence[int], row_length: int, num_replicas: int) -> list[list[int]]:
    """Example indices per row; the number of rows is the smallest multiple of num_replicas (>= 1) that best-fit needs."""
    packed = _best_fit(sizes, row_length)
    count = _round_up(max(len(packed), 1), num_replicas)
    packed = _split_to(packed, sizes, count)
    spread = _spread(sizes, count)

    def longest(rows: list[list[int]]) -> int:
        return max(sum(sizes[index] for index in row) for row in rows)

    return spread if longest(spread) <= longest(packed) else packed


def _by_size(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))


def _best_fit(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: each example into the fullest row that still has room, else into a new one."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in _by_size(sizes):
        fitting = [row for row in range(len(rows)) if room[row] >= sizes[index]]
        if fitting:
            row = min(fitting, key=lambda candidate: (room[candidate], candidate))
        else:
            row = len(rows)
            rows.append([])
            room.append(row_length)
        rows[row].append(index)
        room[row] -= sizes[index]
    return rows


def _split_to(rows: list[list[int]], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Reach `count` rows by taking the largest example out of the longest row that can spare one, then by fillers."""
    rows = [list(row) for row in rows]
    while len(rows) < count:
        sparing = [row for row in rows if len(row) > 1]
        if not sparing:
            return rows + [[] for _ in range(count - len(rows))]
        longest = max(sparing, key=lambda row: sum(sizes[index] for index in row))
        rows.append([longest.pop(0)])
    return rows


def _spread(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Longest first, each into the row that is shortest so far: evens the rows out, may exceed the row length."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in _by_size(sizes):
        row = min(range(count), key=lambda candidate: (loads[candidate], candidate))
        rows[row].append(index)
        loads[row] += sizes[index]
    return rows


def _deal(rows: list[list[int]], loads: list[int], num_replicas: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Hand the rows out, longest first and back and forth over the replicas, so that each gets about the same load."""
    order = sorted(range(len(rows)), key=lambda row: (-loads[row], row))
    replicas: list[list[tuple[int, ...]]] = [[] for _ in range(num_replicas)]
    for turn in range(0, len(order), num_replicas):
        hand = order[turn : turn + num_replicas]
        for replica, row in enumerate(hand if turn // num_replicas % 2 == 0 else reversed(hand)):
            replicas[replica].append(tuple(rows[row]))
    return tuple(tuple(replica) for replica in replicas)
