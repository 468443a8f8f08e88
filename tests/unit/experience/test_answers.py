"""Rollouts of labelled tasks as candidates."""

from __future__ import annotations

import pytest
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.experience.maker import answer_to
from megatron_sip.records import Judgement, Rewriting
from megatron_sip.rollout.sampling import Completion

TOKENIZER = byte_level_tokenizer()
IDS = [*TOKENIZER.encode("the lazy dog"), TOKENIZER.eos_token_id]


def completion(finish: str) -> Completion:
    return Completion(IDS, [-0.1 * place for place in range(len(IDS))], finish, "7")


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_written_answer_keeps_all_its_tokens_and_says_whether_it_was_cut(finish: str) -> None:
    for label in (Rewriting(True, ""), Judgement("safety", "NO", forced=False, pair="", subset="")):
        made = answer_to(TOKENIZER, label, completion(finish))
        assert (made.ids, made.text, made.weight_version) == (IDS, "the lazy dog", "7")
        assert made.truncated == (finish == "length")
        assert len(made.logprobs or []) == len(IDS)


def test_of_a_begun_verdict_the_first_token_is_all_and_nothing_was_cut() -> None:
    made = answer_to(TOKENIZER, Judgement("safety", "NO", forced=True, pair="", subset=""), completion("length"))
    assert (made.ids, made.logprobs, made.truncated) == (IDS[:1], [0.0], False)
    assert made.text == TOKENIZER.decode(IDS[:1])
