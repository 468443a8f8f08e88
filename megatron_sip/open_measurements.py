"""What a run measures on held-out data, on rank 0: as its settings say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sip.config.settings import Settings
from megatron_sip.console import say
from megatron_sip.data.labelled import LabelledSource
from megatron_sip.data.tasks import Tasks
from megatron_sip.evaluation.held_out import HeldOutComparison
from megatron_sip.evaluation.suite_validation import SuiteValidation
from megatron_sip.evaluation.suites.prompt_sets import read_prompts
from megatron_sip.evaluation.suites.prompt_tasks import set_tasks
from megatron_sip.evaluation.validation import Validation
from megatron_sip.records import Task


def open_comparison(settings: Settings, held_out: Tasks | None, tokenizer: Any) -> HeldOutComparison | None:
    """The comparison with the initial policy, on rank 0 when --win-rate-prompts asks for it."""
    prompts = settings.held_out.prompts
    if held_out is None or not prompts:
        return None
    return HeldOutComparison(
        tasks=held_out.tasks(0, prompts),
        documents=[held_out.document(index) for index in range(prompts)],
        sampling=settings.held_out.sampling,
        tokenizer=tokenizer,
        initial=settings.run.run_dir / "initial_continuations.json",
        seed=settings.run.seed,
    )


def open_suites(settings: Settings, held_out: Tasks | None, tokenizer: Any) -> SuiteValidation | None:
    """What documents are measured by, on rank 0 when --eval-interval asks for it."""
    how, run = settings.validation, settings.run
    if run.rank != 0 or not (how.suites or how.prompt_sets):
        return None
    count = how.records if how.suites else 0
    assert held_out is not None or not count, "opened where suites are measured"
    prompts = {name: prompt_tasks(settings, name, path, tokenizer) for name, path in how.prompt_sets.items()}
    told = [f"{', '.join(how.suites)} of {how.records:,} held-out prefixes"] if how.suites else []
    told += [f"safety of {len(tasks):,} continuations of {name}" for name, tasks in prompts.items()]
    say(f"validation: every {how.interval} steps {', '.join(told)}")
    return SuiteValidation(
        suites=how.suites,
        tasks=[] if held_out is None else held_out.tasks(0, count),
        documents=[] if held_out is None else [held_out.document(index) for index in range(count)],
        prompts=prompts,
        sampling=how.sampling,
        tokenizer=tokenizer,
        initial=run.run_dir / "initial_evaluation.json",
        seed=run.seed,
    )


def check_prompt_sets(settings: Settings) -> None:
    """Whether the sets of --eval-suites can be read, before anything costs time. Raises DataError."""
    for name, path in settings.validation.prompt_sets.items():
        read_prompts(name, path)


def prompt_tasks(settings: Settings, name: str, path: Path, tokenizer: Any) -> list[Task]:
    """As many prompts of a set as held-out prefixes are measured, or all of a smaller one. Raises DataError."""
    data = settings.data
    tasks = set_tasks(
        name,
        path,
        tokenizer,
        samples=settings.validation.records,
        room=data.tasks.seq_length - settings.validation.sampling.max_new_tokens,
        prepend_bos=data.tokenizing.prepend_bos,
        seed=settings.run.seed,
    )
    return tasks.tasks(0, tasks.samples)


def open_validation(settings: Settings, held_out: Tasks | None, tokenizer: Any) -> Validation | None:
    """What labelled tasks are measured by, on rank 0 when --eval-interval asks for it."""
    if not isinstance(held_out, LabelledSource):
        return None
    count = min(settings.validation.records, len(held_out))
    say(f"validation: {count:,} of {len(held_out):,} held-out records every {settings.validation.interval} steps")
    return Validation(held_out.tasks(0, count), tokenizer, settings.experience.sampling.max_new_tokens)
