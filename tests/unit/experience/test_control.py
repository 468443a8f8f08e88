"""Control texts: which candidates are learnt behind which text, and that no cut loses it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import adding_bos, byte_level_tokenizer, metaspace_tokenizer

from megatron_sip.errors import ArgumentError
from megatron_sip.experience.control import Control, ControlIds
from megatron_sip.experience.selection import SelectionSettings, select, selection_metrics
from megatron_sip.metrics import flatten
from megatron_sip.records import Branch, Candidate, Example, Group, Task

SAFETY = Control.of("safety", None, 0.5)
IDS = ControlIds((100, 101), (200,), bos=1)
SETTINGS = SelectionSettings("rf-nll", control=SAFETY)


def group(scores: list[float], safety: list[float] | None, prefix: tuple[int, ...] = (5, 6)) -> Group:
    """A suffix and rollouts; candidate i has the ids [10 + i]."""
    made = [Candidate("rollout" if i else "suffix", [10 + i], "", [-0.5] if i else None) for i in range(len(scores))]
    own = {} if safety is None else {"safety": safety}
    return Group(Task(3, list(prefix), [10], "", ""), made, scores, criterion_scores=own)


def learnt(made: Group, settings: SelectionSettings = SETTINGS) -> list[Example]:
    return select([made], settings, IDS).examples


def test_the_best_good_and_the_worst_bad_candidate_are_learnt_each_behind_its_text() -> None:
    made = group([1.1, 1.7, 0.4, 0.9, 0.2], [0.9, 0.8, 0.0, 0.3, 0.0])
    good, bad = learnt(made)
    assert good == Example(3, [100, 101, 5, 6], [Branch([11], "target", "rollout")], head=2)
    assert bad == Example(
        3, [200, 5, 6], [Branch([12], "target", "rollout")], head=1
    )  # of the unsafe ones the better text


def test_the_text_stands_behind_the_bos_of_a_document_that_begins_with_it() -> None:
    good, bad = learnt(group([1.0, 0.0], [1.0, 0.0], prefix=(1, 5)))
    assert (good.prefix_ids, good.head) == ([1, 100, 101, 5], 3)
    assert (bad.prefix_ids, bad.head) == ([1, 200, 5], 2)


@pytest.mark.parametrize(
    ("safety", "threshold", "learnt_ids", "reason"),
    [
        ([0.5, 0.4], 0.5, [[10], [11]], None),  # the threshold itself is good
        ([0.9, 0.8], 0.5, [[10]], None),  # none is bad: the good one alone
        ([0.4, 0.1], 0.5, [], "no good candidate"),
        ([0.4, 0.1], 0.3, [[10], [11]], None),
        (None, 0.5, [], "no safety scores"),
    ],
)
def test_what_a_group_without_both_gives(
    safety: list[float] | None, threshold: float, learnt_ids: list[list[int]], reason: str | None
) -> None:
    settings = dataclasses.replace(SETTINGS, control=Control.of("safety", None, threshold))
    selected = select([group([1.0, 0.5], safety)], settings, IDS)
    assert [example.branches[0].ids for example in selected.examples] == learnt_ids
    assert dict(selected.dropped) == ({} if reason is None else {reason: 1})


def test_a_lone_rollout_is_not_learnt_behind_the_good_text_either() -> None:
    made = group([1.0, 1.0], [1.0, 1.0])
    made = dataclasses.replace(made, candidates=[made.candidates[1]] * 2)
    assert select([made], SETTINGS, IDS).dropped == {"lone rollout": 1}


def test_equal_candidates_are_as_safe_as_they_are_on_average() -> None:
    made = group([1.0, 0.6, 0.2], [0.9, 0.8, 0.1])
    twins = [made.candidates[0], made.candidates[1], dataclasses.replace(made.candidates[2], ids=[11])]
    [good, bad] = learnt(dataclasses.replace(made, candidates=twins))
    assert (good.branches[0].ids, bad.branches[0].ids) == ([10], [11])  # (0.8 + 0.1) / 2 is below 0.5


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)), min_size=2, max_size=8))
def test_what_is_learnt_behind_a_text_is_what_the_criterion_says(scored: list[tuple[float, float]]) -> None:
    made = group([total for total, _ in scored], [own for _, own in scored])
    examples = learnt(made)
    safety = [own for _, own in scored]
    assert bool(examples) == (max(safety) >= 0.5)
    for example in examples:
        own = safety[example.branches[0].ids[0] - 10]
        is_good = example.prefix_ids[: example.head] == [100, 101]
        assert (own >= 0.5) == is_good
        assert is_good or own == pytest.approx(min(safety), abs=1e-9)
    assert len(examples) == (0 if max(safety) < 0.5 else 1 + (min(safety) < 0.5))


def test_how_many_groups_had_both_is_logged() -> None:
    made = [group([1.0, 0.0], [1.0, 0.0]), group([1.0, 0.0], [1.0, 0.8]), group([1.0, 0.0], [0.0, 0.0])]
    metrics = flatten(selection_metrics(made, select(made, SETTINGS, IDS)))
    assert metrics["control_pairs"] == 0.5
    assert metrics["dropped_rate"] == pytest.approx(1 / 3)
    assert "control_pairs" not in flatten(selection_metrics(made, select(made, SelectionSettings("rf-nll"))))


@pytest.mark.parametrize(
    "tokenizer", [byte_level_tokenizer(), metaspace_tokenizer(), adding_bos(byte_level_tokenizer())]
)
@pytest.mark.parametrize("texts", [None, ("<|im_end|>", "<|eos|>"), ("é色\n", " ")])
def test_a_text_takes_no_more_tokens_than_its_row_has_room_for(tokenizer, texts: tuple[str, str] | None) -> None:
    control = Control.of("factuality:v4", texts, 0.5)
    ids = ControlIds.of(control, tokenizer)
    assert 0 < max(len(ids.good), len(ids.bad)) <= control.room
    assert tokenizer.bos_token_id not in (*ids.good, *ids.bad)


def test_reserved_tokens_stay_one_token_and_the_default_texts_are_ordinary_ones() -> None:
    tokenizer = byte_level_tokenizer()
    reserved = ControlIds.of(Control.of("safety", ("<|im_end|>", "<|eos|>"), 0.5), tokenizer)
    assert (reserved.good, reserved.bad) == tuple(
        (tokenizer.convert_tokens_to_ids(token),) for token in ("<|im_end|>", "<|eos|>")
    )
    plain = ControlIds.of(SAFETY, tokenizer)
    assert tokenizer.decode(plain.good) == "[safety: good]\n"
    assert tokenizer.decode(plain.bad) == "[safety: bad]\n"
    assert set(plain.good + plain.bad).isdisjoint(tokenizer.all_special_ids)
    prompt = tokenizer.encode("[safety: good]\nThe quick brown fox")  # as a user types it
    assert prompt == ids_before(plain, tokenizer.encode("The quick brown fox"))


def ids_before(ids: ControlIds, prefix: list[int]) -> list[int]:
    return ids.before(prefix, good=True)[0]


@pytest.mark.parametrize(("good", "bad"), [("", "x"), ("x", "x")])
def test_texts_that_tell_nothing_are_refused(good: str, bad: str) -> None:
    with pytest.raises(ValueError, match="--control-text"):
        Control("safety", good, bad)


def test_texts_that_the_tokenizer_cannot_tell_apart_are_refused() -> None:
    class Deaf:
        bos_token_id = None

        def encode(self, text: str, **_: object) -> list[int]:
            return [0]

    with pytest.raises(ArgumentError, match="--control-text 'a' 'b': the policy's tokenizer does not tell them apart"):
        ControlIds.of(Control("safety", "a", "b"), Deaf())
