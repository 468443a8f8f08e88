"""Rollouts of labelled tasks as candidates."""

from __future__ import annotations

import pytest
from tiny_tokenizer import byte_level_tokenizer

from megatron_sip.data.labelled import WritesTasks
from megatron_sip.experience.maker import answer_to
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.labelled_criteria import read_judgement, rewrite_in
from megatron_sip.judge.labelled_tasks import LabelledKind, LabelledSettings, make_writer
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


HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}<|start|>assistant"
)
THINKS = "{% for m in messages %}{{ m['content'] }}{% endfor %}\nAnswer: "
HARMONY_MARKS = ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>")
THOUGHT = "<|channel|>analysis<|message|>Conclusion: Option 2<|end|><|start|>assistant<|channel|>final<|message|>"


def reasoner(template: str, marks: tuple[str, ...], kind: LabelledKind) -> tuple[WritesTasks, ChatEncoder]:
    """The tasks of a policy whose marks of reasoning are special tokens, and its own tokenizer."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    tokenizer.chat_template = template
    settings = LabelledSettings(kind, max_prompt=4000, max_answer=64, default_verdict="hard")
    return make_writer(settings, tokenizer), ChatEncoder(tokenizer)


@pytest.mark.parametrize(
    ("template", "marks", "thought", "end"),
    [
        (HARMONY, HARMONY_MARKS, THOUGHT, "<|return|>"),
        (THINKS, ("[THINK]", "[/THINK]"), "[THINK]Conclusion: Option 2[/THINK]", "<|eos|>"),
    ],
)
def test_a_policy_whose_marks_are_special_tokens_is_read_as_the_judge_that_it_becomes(
    template: str, marks: tuple[str, ...], thought: str, end: str
) -> None:
    texts = {"prefix": "Once upon", "suffix": " a time there was", "option_1": " a time", "option_2": " a bone"}
    writer, encoder = reasoner(template, marks, "judgements")
    label = writer.task(0, {**texts, "criterion": "quality", "verdict": "1"}).label
    assert isinstance(label, Judgement)
    tokenizer = encoder._tokenizer
    for said, right in (("Conclusion: Option 1", "1"), ("Conclusion: Option 2", "2")):
        ids = tokenizer.encode(thought + said + end, add_special_tokens=False)
        made = answer_to(tokenizer, label, Completion(ids, [0.0] * len(ids), "stop", "7"))
        assert (made.ids, made.text) == (ids, thought + said)
        assert read_judgement(label, made.text, encoder.reasoning, finished=True) == right
    cut = answer_to(tokenizer, label, Completion(ids[:-1], [0.0] * (len(ids) - 1), "length", "7"))
    assert cut.text == thought + said
    rewriting, encoder = reasoner(template, marks, "rewrites")
    label = rewriting.task(0, {**texts, "safe": True}).label
    ids = tokenizer.encode(thought + "ever after" + end, add_special_tokens=False)
    made = answer_to(tokenizer, label, Completion(ids, [0.0] * len(ids), "stop", "7"))
    assert rewrite_in(made.text, texts["prefix"], texts["suffix"])[1]  # it was begun behind all reasoning
