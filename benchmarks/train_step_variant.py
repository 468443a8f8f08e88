"""One variant of `train_step.py` in a process of its own, so that its peak memory is its own.

    python benchmarks/train_step_variant.py dpo_packed --model HF_DIR --result FILE.json
    python benchmarks/train_step_variant.py dpo_packed --model llama-1.4b --made-up --problem 16 1920 2 128 4 --result FILE.json

With --made-up weights are random and so are token ids: of a model no more than its config.json is needed, or a size that the
planner knows. --attention puts another way of attention into the layers than the device's own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from attention_flash import FlashTreeAttention
from machine import number_format, peak_memory_gb, resident_gb
from torch import Tensor
from train_step_problem import PROBLEMS, Problem, make_examples, random_examples, step_flops
from transformers import AutoConfig, AutoTokenizer

from megatron_sip.kernels.tree_attention.dense import tree_attention_dense
from megatron_sip.model.packing import PackedRow, branch_facts, build_row
from megatron_sip.planning.shapes import model_folder
from megatron_sip.records import Example
from megatron_sip.training.objectives.row_loss import row_loss
from megatron_sip.training.objectives.settings import ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ("dpo_packed", "dpo_offload", "dpo_unpacked", "dpo_trl", "grpo_packed", "grpo_unpacked")
LEARNING_RATE, CLIP_GRAD, BETA = 0.0, 1.0, 0.1  # the optimizer does all its work, and every step computes the same


@dataclass(frozen=True)
class Measured:
    """Of one process: seconds of the steps after warming up, memory (on a GPU its own), and what the last step computed."""

    seconds: list[float]
    reference_seconds: list[float]
    resting_gb: float
    peak_gb: float
    computed: dict[str, float]
    flops: float = 0.0
    """Of a step's matrix products."""


ATTENTIONS = {"flash": FlashTreeAttention, "dense": lambda: tree_attention_dense}
"""Beside the device's own."""


@dataclass(frozen=True)
class How:
    """What `measure_ours` measures: see the command line."""

    implementation: str
    warm_up: int
    steps: int
    made_up: bool = False
    attention: str = "own"


def measure_ours(model: Path, problem: Problem, how: How) -> Measured:
    """The trainer of `megatron_sip.train` with Megatron's optimizer; "unpacked", every branch has its prefix to itself;
    "offload", the reference lies in host memory and takes the policy's place for its pass."""
    warm_up, steps, implementation = how.warm_up, how.steps, how.implementation
    trainer, reference, pad_id = build_trainer(
        model, problem, warm_up + steps, offload=implementation == "offload", made_up=how.made_up
    )
    from megatron_sip.metrics import flatten

    if how.attention != "own":
        attend_by([*trainer.model, *(reference_chunks(reference))], ATTENTIONS[how.attention]())
    config = AutoConfig.from_pretrained(model)
    resting = resident_gb() if DEVICE == "cpu" else torch.cuda.memory_allocated() / 1e9
    seconds, metrics = [], []
    if how.made_up:
        examples = random_examples(problem, config.vocab_size)
    else:
        examples = make_examples(problem, AutoTokenizer.from_pretrained(model))
    rows = unpacked_rows(problem, examples, pad_id) if implementation == "unpacked" else None
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        if rows is None:
            metrics.append(flatten(trainer.train_step(examples, reference, 0)))
        else:
            metrics.append(flatten(trainer.train_rows(examples, rows, reference, 0)))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    wanted = ("loss", "grad_norm", "logprob", "chosen_logprob", "rejected_logprob")
    return Measured(
        seconds=seconds[warm_up:],
        reference_seconds=[float(step["seconds/reference"]) for step in metrics[warm_up:]],
        resting_gb=resting,
        peak_gb=peak_memory_gb(DEVICE),
        computed={name: float(metrics[-1][name]) for name in wanted if name in metrics[-1]},
        flops=step_flops(problem, implementation != "unpacked", config),
    )


def reference_chunks(reference: Any) -> list[Any]:
    """The reference's own model; nothing where it has none."""
    if reference is None:
        return []
    with reference.active() as chunks:
        return list(chunks)


def attend_by(chunks: Sequence[Any], attention: Any) -> None:
    """Let all layers of these models attend that way."""
    from megatron_sip.model.attention import PrefixTreeAttention

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, PrefixTreeAttention):
                module.attend = attention


def build_trainer(
    model: Path, problem: Problem, steps: int, *, offload: bool = False, made_up: bool = False, dtype: Any = None
) -> tuple[Any, Any, int]:
    """(PolicyTrainer with the model's weights, reference or None, pad id), as a run sets them up on one process; in `dtype`,
    by default the machine's."""
    from megatron_sip.hf.standalone import initialize_megatron_for

    config = AutoConfig.from_pretrained(model)
    config.dtype = dtype or number_format()
    initialize_megatron_for(config, megatron_flags(problem, steps))

    from megatron_sip.hf.weights import load_hf_weights
    from megatron_sip.training.leaders import LeaderExchange
    from megatron_sip.training.reference_model import build_reference
    from megatron_sip.training.trainer import PolicyTrainer, TrainerSettings

    row_length = problem.row_examples * (problem.prefix + problem.branches * problem.branch)
    settings = TrainerSettings(row_length, problem.examples)
    objective = ObjectiveSettings(problem.objective, beta=BETA)
    loss = grpo_loss if problem.objective == "grpo" else row_loss
    pad_id = config.pad_token_id or 0
    trainer = PolicyTrainer(settings, objective, LeaderExchange(timeout_seconds=600), pad_id, loss)
    if not made_up:
        load_hf_weights(trainer.model, model)
    trainer.optimizer.reload_model_params()
    if not objective.needs_reference:
        return trainer, None, pad_id
    return trainer, build_reference(trainer.model, offload=offload), pad_id


def megatron_flags(problem: Problem, steps: int) -> list[str]:
    """What `megatron_sip.train` implies or a user gives it, as far as a step depends on it."""
    return [
        *("--calculate-per-token-loss", "--no-check-for-nan-in-loss-and-grad", "--rerun-mode", "disabled"),
        *("--attention-dropout", "0", "--hidden-dropout", "0"),
        *("--global-batch-size", str(problem.examples), "--train-iters", str(steps)),
        *("--lr", str(LEARNING_RATE), "--lr-decay-style", "constant", "--clip-grad", str(CLIP_GRAD)),
        *("--weight-decay", "0.0", "--adam-beta2", "0.999"),
    ]


def grpo_loss(
    settings: ObjectiveSettings, row: PackedRow, token_logprobs: Tensor, reference_token_logprobs: Tensor | None
) -> LossTerms:
    """`row_loss` of an on-policy GRPO step; its value is the same whatever the model, so the log-probs are reported too."""
    terms = row_loss(settings, row, token_logprobs, reference_token_logprobs)
    return replace(terms, metrics=terms.metrics | {"logprob": token_logprobs.detach().sum()})


def unpacked_rows(problem: Problem, examples: Sequence[Example], pad_id: int) -> list[PackedRow]:
    """Rows in which no prefix is shared, as many examples in a row as packed ones have. A DPO row has to hold whole pairs,
    [prefix | chosen][prefix | rejected], since its loss needs both; a GRPO row is one completion."""
    alone = [replace(example, branches=[branch]) for example in examples for branch in example.branches]
    together = problem.row_examples * problem.branches if problem.objective == "dpo" else 1
    rows = []
    for first in range(0, len(alone), together):
        branches = range(first, min(first + together, len(alone)))
        row = build_row(alone, branches, together * (problem.prefix + problem.branch), pad_id)
        if problem.objective == "dpo":
            pairs = tuple(examples[branches.start // 2 : branches.stop // 2])
            row = replace(row, examples=pairs, facts=branch_facts(pairs))
        rows.append(row)
    return rows


def measure_trl(model: Path, problem: Problem, warm_up: int, steps: int) -> Measured:
    """TRL's DPOTrainer: its training loop, its reference model, torch's AdamW, all pairs in one batch."""
    from train_step_trl import StepClock, build_dpo_trainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    batches = [make_examples(problem, tokenizer)] * (warm_up + steps)
    clock = StepClock(resident_gb)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_dpo_trainer(
            model, batches, Path(folder), learning_rate=LEARNING_RATE, clip_grad=CLIP_GRAD, beta=BETA
        )
        trainer.add_callback(clock)
        trainer.train()
    last = [line for line in trainer.state.log_history if "logps/chosen" in line][-1]
    names = {"loss": "loss", "grad_norm": "grad_norm"}
    names |= {"chosen_logprob": "logps/chosen", "rejected_logprob": "logps/rejected"}
    return Measured(
        seconds=clock.seconds[warm_up:],
        reference_seconds=[],
        resting_gb=clock.resting_gb,
        peak_gb=peak_memory_gb(),
        computed={name: float(last[theirs]) for name, theirs in names.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--model", required=True, metavar="DIR", help="HF folder, weights in bf16")
    parser.add_argument("--made-up", action="store_true", help="random weights and tokens; --model may be a size then")
    sizes = [field.name.upper() for field in fields(Problem)][1:]
    parser.add_argument("--problem", type=int, nargs=len(sizes), metavar=tuple(sizes), help="other sizes of examples")
    parser.add_argument("--attention", choices=("own", *ATTENTIONS), default="own")
    parser.add_argument("--steps", type=int, default=1, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed steps before")
    parser.add_argument("--result", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    objective, implementation = args.variant.split("_")
    problem = Problem(objective, *args.problem) if args.problem else PROBLEMS[objective]
    model = model_folder(args.model) if args.made_up else Path(args.model)
    if implementation == "trl":
        measured = measure_trl(model, problem, args.warm_up, args.steps)
    else:
        how = How(implementation, args.warm_up, args.steps, args.made_up, args.attention)
        measured = measure_ours(model, problem, how)
    args.result.write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
