"""Steps of PolicyTrainer that go wrong, and ones that continue under other settings, for test_trainer_steps.

    torchrun --nproc-per-node 2 tests/integration/trainer_worker.py HF_DIR CASES.json RESULTS_DIR

CASES.json is a list of cases: {"name", "dtype", "flags", "faults"}. Each builds policy and optimizer as a run does (its flags
may load a checkpoint), trains one step for each of "faults" (null: none, "loss" or "gradient": that of the row with task 1 is
not a number), saves a checkpoint where --save says, and writes what each step was like to RESULTS_DIR/NAME.RANK.json. In a
case with "megatron" the optimizer makes its own step, whatever loss and gradient are.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_worker import forget_megatron, prepare_for_cases
from transformers import AutoConfig

from megatron_sip.hf.standalone import initialize_megatron_for
from megatron_sip.metrics import flatten
from megatron_sip.records import Branch, Example
from megatron_sip.training.non_finite import Attempt
from megatron_sip.training.objectives.row_loss import row_loss
from megatron_sip.training.objectives.settings import ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

FLAGS = (
    *("--global-batch-size", "4", "--calculate-per-token-loss", "--override-opt-param-scheduler"),
    *("--save-interval", "9", "--no-check-for-nan-in-loss-and-grad", "--attention-dropout"),
    *("0", "--hidden-dropout", "0"),
)
EXAMPLES = [
    Example(task, list(range(5 + task, 15 + task)), [Branch(list(range(20, 26 + task)), "target", "suffix")])
    for task in range(4)
]
BAD_TASK = 1


class FaultyLoss:
    """The loss of the objective, but for the fault that is set."""

    def __init__(self) -> None:
        self.fault: str | None = None

    def __call__(self, settings: Any, row: Any, token_logprobs: Any, *others: Any) -> LossTerms:
        terms = row_loss(settings, row, token_logprobs, *others)
        if BAD_TASK not in {example.task_index for example in row.examples} or self.fault is None:
            return terms
        if self.fault == "loss":
            return replace(terms, sum=terms.sum * float("nan"))
        root = (token_logprobs - token_logprobs.detach()).sum().abs().sqrt()  # 0, with a slope that is none
        return replace(terms, sum=terms.sum + root)


def run_case(case: dict[str, Any], hf_dir: str) -> list[dict[str, Any]]:
    from megatron.training import get_args
    from megatron.training.checkpointing import save_checkpoint

    from megatron_sip.hf.weights import load_hf_weights
    from megatron_sip.training.leaders import LeaderExchange
    from megatron_sip.training.trainer import PolicyTrainer, TrainerSettings

    hf_config = AutoConfig.from_pretrained(hf_dir)
    hf_config.dtype = getattr(torch, case["dtype"])
    initialize_megatron_for(hf_config, [*FLAGS, *case["flags"]])
    args = get_args()
    args.logit_chunk_columns = 0
    loss = FaultyLoss()
    settings = TrainerSettings(row_length=48, global_batch_size=args.global_batch_size)
    trainer = PolicyTrainer(settings, ObjectiveSettings("sft"), LeaderExchange(timeout_seconds=60), pad_id=0, loss=loss)
    if args.iteration == 0:
        load_hf_weights(trainer.model, hf_dir)
        trainer.optimizer.reload_model_params()
    if case.get("megatron"):
        trainer._try_step = lambda loss: Attempt(None, float(trainer.optimizer.step()[1]), 1.0, 1.0)  # type: ignore[method-assign]
    steps: list[dict[str, Any]] = [{"state": digest(trainer)}]
    for fault in case["faults"]:
        loss.fault = fault
        metrics = flatten(trainer.train_step(EXAMPLES, None, args.iteration))
        steps.append({"state": digest(trainer), "metrics": metrics, "settings": settings_of(trainer)})
        args.iteration += 1
    if args.save:
        save_checkpoint(args.iteration, trainer.model, trainer.optimizer, trainer.scheduler, 0)
    return steps


def digest(trainer: Any) -> str:
    """Of all that a step changes: parameters, as the model has them and in float32, and what the optimizer keeps of each."""
    found = hashlib.sha256()
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    mine = [parameter for group in inner.param_groups for parameter in group["params"]]
    kept = [inner.state[parameter][name] for parameter in mine for name in sorted(inner.state.get(parameter, {}))]
    for tensor in [*(p for chunk in trainer.model for p in chunk.parameters()), *mine, *kept]:
        found.update(tensor.detach().double().numpy().tobytes())
    return found.hexdigest()


def settings_of(trainer: Any) -> dict[str, Any]:
    """Of the optimizer's first group, and the updates it has made."""
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    group = inner.param_groups[0]
    updates = {float(state["step"]) for state in inner.state.values()}
    return {"lr": group["lr"], "eps": group["eps"], "betas": list(group["betas"]), "updates": sorted(updates)}


def main() -> None:
    hf_dir, cases, results = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    prepare_for_cases()
    for case in cases:
        steps = run_case(case, hf_dir)
        (results / f"{case['name']}.{dist.get_rank()}.json").write_text(json.dumps(steps))
        forget_megatron()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
