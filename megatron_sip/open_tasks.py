"""Where a run's tasks come from: documents or labelled records, as its settings say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_sip.config.settings import Settings
from megatron_sip.console import say
from megatron_sip.data.documents import open_splits
from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.data.roles import Split
from megatron_sip.data.shared_texts import count_shared_texts
from megatron_sip.data.tasks import Tasks, TaskSource
from megatron_sip.data.tokenization import DocumentEncoder
from megatron_sip.judge.labelled_tasks import JudgementWriter, make_writer
from megatron_sip.training.leaders import LeaderExchange


def open_tasks(settings: Settings, tokenizer: Any, exchange: LeaderExchange) -> tuple[Tasks | None, Tasks | None]:
    """(training tasks, held-out tasks) on leaders; rank 0 goes first, so that text is tokenised once."""
    run = settings.run
    training: Tasks | None = None
    held_out: Tasks | None = None
    for turn in (True, False):
        if exchange.is_leader and (run.rank == 0) == turn:
            labelled = settings.data.labelled is not None
            opened = open_labelled_tasks if labelled else open_document_tasks
            training, held_out = opened(settings, tokenizer)
            if run.rank == 0:
                count = run.steps * run.prompts
                say(f"tasks: {training.summary(count)}")
                print(f"tasks: {training.report(count)}", flush=True)
        exchange.barrier()
    return training, held_out


def open_document_tasks(settings: Settings, tokenizer: Any) -> tuple[Tasks, Tasks | None]:
    """Documents, cut; held-out ones on rank 0, where something is to be measured on them."""
    data, rank = settings.data, settings.run.rank
    if rank == 0:
        say(f"data: opening it; text is tokenised once and kept in {data.tokenizing.cache_dir}")
    measured = rank == 0 and bool(settings.held_out.prompts or settings.validation.suites)
    names: list[Split] = ["train", "test"] if measured else ["train"]
    split = data.split if data.subset is None else None
    splits = open_splits(names, data.paths, split, data.subset, tokenizer, data.tokenizing, vocab_size=data.vocab_size)
    training = TaskSource(splits["train"], tokenizer, data.tasks)
    if not measured:
        return training, None
    around = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    say(f"data: {count_shared_texts(splits['train'], splits['test'], around, data.tokenizing.cache_dir)}")
    return training, TaskSource(splits["test"], tokenizer, data.tasks)


def open_labelled_tasks(settings: Settings, tokenizer: Any) -> tuple[Tasks, Tasks | None]:
    """Labelled records of the training split; held-out ones on rank 0, where --eval-interval asks for them."""
    data = settings.data
    assert data.labelled is not None
    if settings.run.rank == 0:
        say(f"data: reading and checking the {data.labelled.kind}")
    bos = DocumentEncoder.of(tokenizer, data.tokenizing).bos
    labelled = replace(data.labelled, begins_with=bos)
    writer = make_writer(labelled, tokenizer)
    records = open_records(data.paths, data.split, writer)
    if isinstance(writer, JudgementWriter):
        writer.require_criteria()
    training = LabelledSource(records, "train", writer, labelled.seed)
    if settings.run.rank != 0 or not settings.validation.interval:
        return training, None
    # With a writer of its own: what that counts is no step's.
    return training, LabelledSource(records, "valid", make_writer(labelled, tokenizer), labelled.seed)
