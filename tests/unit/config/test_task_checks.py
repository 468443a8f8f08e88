"""Flags of labelled tasks: what they default to, what they need, and what means nothing with them."""

from __future__ import annotations

from typing import Any

import pytest
from flag_cases import arguments, check_all, settings

from megatron_sip.config.dry_run import describe, prompt_cost
from megatron_sip.errors import ArgumentError

JUDGEMENTS = ("--tasks", "judgements", "--objective", "rf-nll")
NO_TEACHER: dict[str, Any] = {"teacher_url": None}


def refusal(*flags: str, **megatron: Any) -> str:
    with pytest.raises(ArgumentError) as caught:
        check_all(arguments(*flags, **megatron))
    return str(caught.value)


def test_a_judge_is_trained_without_another_judge() -> None:
    made = settings(*JUDGEMENTS, "--judge-verdict", "soft", "safety=hard", **NO_TEACHER)
    assert made.needs.kinds == ("rollout",)
    assert not made.needs.teacher
    assert made.judge is not None
    assert (dict(made.judge.criteria), made.judge.client) == ({"label": 1.0}, None)
    assert made.clients(made.urls).judge == made.judge
    assert made.data.labelled is not None
    assert (made.data.labelled.max_prompt, made.data.labelled.max_answer) == (2048 - 128, 128)
    assert [made.data.labelled.mode(name) for name in ("quality", "safety")] == ["soft", "hard"]
    told = describe(made)
    assert "labelled judgements, prompts of up to 1,920 tokens; answers begun up to the verdict's first token" in told
    assert "written for safety" in told
    assert "label (weight 1): asks no server" in told


def test_the_longest_prompt_may_be_shorter() -> None:
    made = settings(*JUDGEMENTS, "--max-prompt-length", "1000", **NO_TEACHER)
    assert made.data.labelled is not None
    assert made.data.labelled.max_prompt == 1000


def test_documents_are_scored_by_likelihood_unless_told_otherwise() -> None:
    made = settings()
    assert made.judge is not None
    assert dict(made.judge.criteria) == {"likelihood": 1.0}
    assert made.needs.kinds == ("suffix", "rollout")
    assert made.data.labelled is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-prompt-length", "100"), "--max-prompt-length: for labelled tasks"),
        (("--criteria", "label=1"), "--criteria label: it scores --tasks judgements, these are documents"),
        ((*JUDGEMENTS, "--criteria", "copy=1"), "--criteria copy: it scores --tasks rewrites, these are judgements"),
        ((*JUDGEMENTS, "--criteria", "label", "quality"), "--criteria quality: it scores continuations of documents"),
        ((*JUDGEMENTS, "--objective", "sft"), "--objective sft: labelled tasks are learnt from scored rollouts alone"),
        (
            (*JUDGEMENTS, "--candidates", "suffix", "rollout"),
            "--candidates suffix rollout: judgements have rollouts alone",
        ),
        ((*JUDGEMENTS, "--win-rate-prompts", "4"), "--win-rate-prompts: it compares continuations of documents"),
        ((*JUDGEMENTS, "--max-prompt-length", "1921"), "at least 1, at most 1920"),
        ((*JUDGEMENTS, "--task-mode", "stream"), "--task-mode: it is for --tasks documents"),
    ],
)
def test_what_means_nothing_is_refused(flags: tuple[str, ...], message: str) -> None:
    assert message in refusal(*flags)


def test_pairs_need_an_even_batch() -> None:
    message = refusal(*JUDGEMENTS, global_batch_size=7, data_parallel_size=1)
    assert "--global-batch-size 7: judgements come in pairs" in message


def test_rewrites_ask_for_quality_in_both_orders_and_for_safety() -> None:
    made = settings("--tasks", "rewrites", "--objective", "rf-nll", "--num-rollouts", "4", "--judge-verdict", "hard")
    assert made.needs.teacher
    assert made.judge is not None
    assert dict(made.judge.criteria) == {"copy": 1.0, "rewrite": 1.0}
    cost = prompt_cost(made)
    assert cost["pair judgements"] == 4 * 6  # five votes, made even
    assert cost["point judgements"] == 4 * 5
    assert cost["judge requests"] == 4 * 2 + 4
    told = describe(made)
    assert "copy (weight 1): asks no server" in told
    assert "rewrite (weight 1): hard verdicts; 24 pair judgements, 20 point judgements of an unsafe suffix" in told


def test_thoughts_are_scored_by_similarity() -> None:
    made = settings("--tasks", "thoughts", "--objective", "rf-nll", "--num-rollouts", "4")
    assert made.judge is not None
    assert dict(made.judge.criteria) == {"similarity": 1.0}
    assert prompt_cost(made)["point judgements"] == 4


@pytest.mark.parametrize(
    ("flags", "interval", "message"),
    [
        (JUDGEMENTS, 0, "--eval-interval 0, --eval-records 256: both must be at least 1"),
        ((*JUDGEMENTS, "--eval-records", "0"), 5, "--eval-interval 5, --eval-records 0: both must be at least 1"),
        ((*JUDGEMENTS, "--replay-groups", "."), 5, "--eval-interval: --replay-groups asks no engine"),
        (
            (*JUDGEMENTS, "--eval-suites", "nll"),
            5,
            "--eval-suites: of documents; --tasks judgements are measured by their",
        ),
        (("--eval-suites", "nl"), 5, "--eval-suites nl: known are nll, diversity, win-rate, and NAME=FILE"),
        (
            ("--eval-suites", "xtest=a"),
            5,
            "--eval-suites xtest=a: sets that are rated are realtoxicityprompts, toxigen",
        ),
        (("--eval-suites", "toxigen=a", "toxigen=b"), 5, "a set is named twice"),
        (("--eval-records", "5"), None, "--eval-records: of no effect without --eval-interval"),
        (("--eval-suites", "toxigen=nowhere"), 5, "--eval-suites toxigen=nowhere: no such file"),
        (("--eval-suites", "nll"), None, "--eval-suites: of no effect without --eval-interval"),
        (("--eval-by-training-judge",), 5, "--eval-by-training-judge: of no effect without win-rate"),
        (("--eval-suites", "win-rate"), 5, "--eval-suites win-rate: a judge that the policy is trained to please"),
        (
            ("--eval-suites", "win-rate", "--eval-by-training-judge", "--eval-judge-url", "http://other"),
            5,
            "say --eval-by-training-judge (one of the two)",
        ),
        (("--task-mode", "whole", "--objective", "sft", "--sft-target", "document"), 5, "--task-mode whole cuts none"),
    ],
)
def test_a_validation_that_cannot_be_is_refused(flags: tuple[str, ...], interval: int | None, message: str) -> None:
    assert message in refusal(*flags, eval_interval=interval)


def test_held_out_text_is_measured_by_its_likelihood_and_the_diversity_of_continuations_unless_told_otherwise() -> None:
    made = settings("--objective", "sft", eval_interval=5)
    assert made.validation.suites == ("nll", "diversity")
    assert (made.needs.engines, made.needs.judge, made.needs.eval_judge) == (True, False, False)
    judged = settings("--eval-suites", "win-rate", "--eval-judge-url", "http://other", eval_interval=5)
    assert judged.needs.eval_judge
    assert judged.eval_judge is not None
    by_teacher = settings(
        "--objective", "sft", "--eval-suites", "win-rate", "--eval-by-training-judge", eval_interval=5
    )
    assert (by_teacher.needs.judge, by_teacher.needs.eval_judge) == (True, False)
    rated = settings("--eval-suites", f"toxigen={__file__}", "--eval-judge-url", "http://other", eval_interval=5)
    assert rated.validation.suites == ()
    assert rated.rating_judge is not None
    assert rated.rating_judge.client is not None
    assert rated.rating_judge.client.endpoint.url == "http://other"
    asked = rated.rating_judge
    assert (asked.temperature, asked.top_p, asked.votes, asked.mode("safety")) == (1.0, 1.0, 5, "hard")
    assert settings(*JUDGEMENTS, eval_interval=5, **NO_TEACHER).validation.suites == ()


def test_validations_are_of_the_initial_weights_of_every_so_many_steps_and_of_the_last() -> None:
    made = settings(*JUDGEMENTS, "--eval-records", "7", eval_interval=4, **NO_TEACHER).validation
    assert made.records == 7
    assert [step for step in range(11) if made.is_due(step, steps=10)] == [0, 4, 8, 10]
    never = settings().validation
    assert not any(never.is_due(step, steps=10) for step in range(11))
