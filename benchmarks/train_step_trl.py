"""TRL's DPOTrainer for `train_step.py`, on pairs given as token ids. Needs the extra `bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from machine import number_format
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from megatron_sip.records import Example


class StepClock(TrainerCallback):
    """Seconds of each optimizer step: reference pass, forward, backward, clipping, optimizer; not data and logging."""

    def __init__(self, resident_gb: Callable[[], float]) -> None:
        self.seconds: list[float] = []
        self.resting_gb = 0.0
        self._resident_gb = resident_gb
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.seconds:
            self.resting_gb = self._resident_gb()
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def build_dpo_trainer(
    model: Path,
    batches: Sequence[Sequence[Example]],
    folder: Path,
    *,
    learning_rate: float,
    clip_grad: float,
    beta: float,
) -> DPOTrainer:
    """A DPOTrainer that takes a step on each of the equally large batches, without activation checkpoints."""
    examples = [example for batch in batches for example in batch]
    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(batches[0]),
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=clip_grad,
        weight_decay=0.0,
        beta=beta,
        max_length=None,
        bf16=False,  # the weights are in that format already: autocast would only add casts
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    weights = {"dtype": number_format(), "attn_implementation": "sdpa"}
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * len(examples))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, **weights),
        ref_model=AutoModelForCausalLM.from_pretrained(model, **weights),
        args=config,
        train_dataset=text,
        processing_class=tokenizer,
    )
    # Exactly our ids: text would be tokenised again, and TRL would add an end of sequence to every completion.
    trainer.train_dataset = Dataset.from_list(
        [
            {"prompt_ids": e.prefix_ids, "chosen_ids": e.branches[0].ids, "rejected_ids": e.branches[1].ids}
            for e in examples
        ]
    )
    return trainer
