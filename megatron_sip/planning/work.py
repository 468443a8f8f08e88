"""What a step of a run asks of trainers, engines and judge, in tokens and calls: from its settings, by the dry run's counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_sip.config.dry_run import prompt_cost, step_cost
from megatron_sip.config.needs import branch_count, branches_in_a_row
from megatron_sip.config.settings import Settings
from megatron_sip.judge.rewriter import RewriterSettings
from megatron_sip.judge.settings import JudgeSettings
from megatron_sip.serving.calls_in_flight import calls_in_flight

JUDGEMENTS = "judgements"


@dataclass(frozen=True, slots=True)
class Serving:
    """A step's work of one role's servers.

    prefilled: tokens, which attend to `context` others on the average; the output layer is run for `predicted` of them.
    sequences: answers, of `length` tokens each; one holds `held` tokens of keys and values that no other shares, and
    reads those of `reads` tokens at each decode step. A call asks for `per_call` of them; all leaders
    together have `in_flight` calls under way at most (None: by the number of servers).
    """

    prefilled: float = 0.0
    context: float = 0.0
    predicted: float = 0.0
    sequences: float = 0.0
    length: float = 0.0
    held: float = 0.0
    reads: float = 0.0
    per_call: float = 1.0
    in_flight: int | None = None

    def asked_at_once(self, servers: int) -> float:
        """Sequences that are asked for at the same time at each of so many servers."""
        return calls_in_flight(self.in_flight, servers) * self.per_call / servers


@dataclass(frozen=True, slots=True)
class Training:
    """A step's examples, all alike: `branches` of `suffix` tokens behind one prefix, packed in rows of `row_length` at most."""

    examples: int
    prefix: int
    suffix: int
    branches: int
    row_length: int
    reference: bool


@dataclass(frozen=True, slots=True)
class Work:
    """A step. counts: what --dry-run prints of it, by name."""

    prompts: int
    rollouts: Serving
    judge: Serving
    rewrites: Serving
    training: Training
    counts: Mapping[str, int]


def step_work(settings: Settings, answer_share: float) -> Work:
    """A step of this run. answer_share: which part of their room written answers fill, of judge and rewriter."""
    prompts = settings.run.prompts
    counts = step_cost(settings, prompt_cost(settings))
    labelled, tasks = settings.data.labelled, settings.data.tasks
    prefix = tasks.seq_length - tasks.suffix_length if labelled is None else labelled.max_prompt
    return Work(
        prompts=prompts,
        rollouts=replace(_rollouts(counts, settings, prefix), in_flight=settings.rollouts.concurrency),
        judge=replace(_judge(counts, tasks.suffix_length, answer_share), in_flight=_calls(settings.judge)),
        rewrites=replace(_rewrites(counts, answer_share), in_flight=_calls(settings.rewriter)),
        training=_training(settings, prefix),
        counts=counts,
    )


def _calls(asking: JudgeSettings | RewriterSettings | None) -> int | None:
    return 1 if asking is None or asking.client is None else asking.client.concurrency


def _rollouts(counts: Mapping[str, int], settings: Settings, prefix: int) -> Serving:
    rollouts, suffix = settings.experience.sampling.n, settings.data.tasks.suffix_length
    generated = counts.get("rollout tokens, generated", 0)
    return Serving(
        prefilled=counts.get("rollout tokens, prefilled", 0),
        context=prefix / 2,
        sequences=generated / suffix,
        length=suffix,
        held=prefix / max(rollouts, 1) + suffix,
        reads=prefix + suffix / 2,
        per_call=rollouts,
    )


def _judge(counts: Mapping[str, int], suffix: int, share: float) -> Serving:
    requests, answers = counts.get("judge requests", 0), counts.get("judge tokens, answers", 0)
    if not requests:
        return Serving()
    prefilled, shown = counts["judge tokens, uncached"], counts["judge tokens, prompts"] / requests
    judgements = sum(count for name, count in counts.items() if name.endswith(JUDGEMENTS)) if answers else 0
    length = share * answers / judgements if judgements else 0.0
    return Serving(
        prefilled=prefilled,
        context=shown / 2,
        predicted=counts.get("likelihood judgements", 0) * suffix,
        sequences=judgements,
        length=length,
        held=prefilled / max(judgements, 1) + length,
        reads=shown + length / 2,
        per_call=max(1.0, judgements / requests),
    )


def _rewrites(counts: Mapping[str, int], share: float) -> Serving:
    calls = counts.get("rewriter calls", 0)
    if not calls:
        return Serving()
    prompt, answer = counts["rewriter tokens, prompt"] / calls, share * counts["rewriter tokens, answer"] / calls
    return Serving(
        prefilled=calls * prompt,
        context=prompt / 2,
        sequences=calls,
        length=answer,
        held=prompt + answer,
        reads=prompt + answer / 2,
    )


def _training(settings: Settings, prefix: int) -> Training:
    rollouts, objective = settings.experience.sampling.n, settings.objective.objective
    whole = branch_count(objective, rollouts)
    branches = branches_in_a_row(objective, rollouts, settings.branches_per_row)
    control = 1 if settings.experience.selection.control is None else 2
    suffix = settings.data.tasks.suffix_length
    if (
        settings.experience.selection.sft_target == "document" and objective == "sft"
    ):  # every token but the first is predicted
        prefix, suffix = 1, prefix + suffix - 1
    return Training(
        examples=settings.run.prompts * control * -(-whole // branches),
        prefix=prefix,
        suffix=suffix,
        branches=branches,
        row_length=settings.row_length,
        reference=settings.objective.needs_reference,
    )
