"""Gradients of packed or separate rows at several parallel layouts, for test_packed_equals_separate.

    torchrun --nproc-per-node 4 tests/integration/packing_worker.py CASES.json RESULTS_DIR

CASES.json is a list of {"name", "problem", "hf_dir", "dtype", "flags", "row_length", "separate", "branches_per_row"}. Every
rank writes the loss and those gradients, whole and by their HF names, that the weight export hands it, to
RESULTS_DIR/NAME.RANK.pt.

"separate" runs each branch in an unpadded row of its own and one plain autograd graph over all of them (one process);
otherwise the rows are planned as in training and go through Megatron's schedule, DDP and gradient finalisation.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from parity_worker import forget_megatron, prepare_for_cases
from torch import Tensor

from megatron_sip.hf.standalone import initialize_megatron_for
from megatron_sip.model.packing import PackedRow, build_row, example_lengths, plan_rows, split_branches
from megatron_sip.records import Branch, Example, Role
from megatron_sip.training.objectives.row_loss import row_loss
from megatron_sip.training.objectives.settings import ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms

VOCABULARY = 131


@dataclass(frozen=True)
class Problem:
    """Examples, and the reference's log-probs of their branches, by task and token ids."""

    settings: ObjectiveSettings
    examples: list[Example]
    reference: dict[tuple[int, tuple[int, ...]], Tensor]


def make_problem(name: str) -> Problem:
    """dpo: 7 pairs of random lengths; grpo: groups of 1, 2, 5 and 16 branches; few: 5 pairs of one size; long: 8 pairs,
    longer than the attention kernels' blocks."""
    rng = random.Random(name)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

    def made(role: Role, tokens: list[int]) -> Branch:
        """With engine log-probs near those of the random model, so that some are corrected and others not."""
        engine = [rng.uniform(-6, -4) for _ in tokens]
        return Branch(tokens, role, "rollout", advantage=rng.uniform(-1, 1), engine_logprobs=engine)

    shapes = {"dpo": [(1, 40, 1, 20, 2)] * 7, "few": [(30, 30, 8, 8, 2)] * 5, "long": [(90, 150, 20, 80, 2)] * 8}
    shapes["grpo"] = [(1, 30, 1, 12, branches) for branches in (1, 2, 5, 16)]
    examples = []
    for task, (low, high, shortest, longest, count) in enumerate(shapes[name]):
        roles: list[Role] = ["sampled"] * count if name == "grpo" else ["chosen", "rejected"]
        branches = [made(role, ids(shortest, longest)) for role in roles]
        examples.append(Example(task, ids(low, high), branches))
    # Near the log-probs of the random model under test, so that neither the sigmoid nor the KL term is saturated.
    reference = {
        (example.task_index, tuple(branch.ids)): torch.tensor([rng.uniform(-6, -4) for _ in branch.ids])
        for example in examples
        for branch in example.branches
    }
    settings = ObjectiveSettings("grpo", kl_coef=0.1) if name == "grpo" else ObjectiveSettings("dpo", nll_coef=0.2)
    return Problem(settings, examples, reference)


def loss_of(problem: Problem, row: PackedRow, token_logprobs: Tensor) -> LossTerms:
    branches = [(example.task_index, tuple(branch.ids)) for example in row.examples for branch in example.branches]
    reference = [problem.reference[branch] for branch in branches]
    return row_loss(problem.settings, row, token_logprobs, torch.cat([torch.zeros(0), *reference]))


def train_on_packed_rows(
    problem: Problem, model: list, row_length: int, branches_per_row: int | None
) -> tuple[float, int]:
    """Gradients into main_grad; returns this replica's loss sum and its number of filler rows (last stage)."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    from megatron_sip.model.gpt import row_logprobs

    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    if model[0].ddp_config.overlap_grad_reduce:
        config.no_sync_func = model[0].no_sync
    examples = problem.examples if branches_per_row is None else split_branches(problem.examples, branches_per_row)
    plan = plan_rows(
        example_lengths(examples),
        row_length,
        parallel_state.get_data_parallel_world_size(),
        multiple_of=16,
    )
    mine = plan.rows[parallel_state.get_data_parallel_rank()]
    losses = []

    def forward_step(iterator, chunk):
        row = build_row(examples, next(iterator), plan.row_length, pad_id=0)

        def loss_function(token_logprobs: Tensor):
            terms = loss_of(problem, row, token_logprobs)
            losses.append((terms.sum.item(), terms.count))
            return terms.sum, torch.tensor(terms.count, dtype=torch.int), {}

        return row_logprobs(chunk, row), loss_function

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(mine),
        model=model,
        num_microbatches=len(mine),
        seq_length=plan.row_length,
        micro_batch_size=1,
        forward_only=False,
    )
    total = torch.tensor([sum(s for s, _ in losses), sum(c for _, c in losses)], dtype=torch.float64)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    loss = float(total[0] / total[1]) if parallel_state.is_pipeline_last_stage() else float("nan")
    return loss, sum(row == () for replica in plan.rows for row in replica)


def train_on_separate_rows(problem: Problem, model: list) -> tuple[float, int]:
    from megatron_sip.model.gpt import row_logprobs

    everything = build_row(problem.examples, range(len(problem.examples)), 10_000, pad_id=0)
    parts = []
    for example in problem.examples:
        for branch in example.branches:
            length = len(example.prefix_ids) + len(branch.ids)
            parts.append(
                row_logprobs(model[0], build_row([replace(example, branches=[branch])], [0], length, pad_id=0))
            )
    terms = loss_of(problem, everything, torch.cat(parts))
    loss = terms.sum / terms.count
    loss.backward()
    return loss.item(), 0


def run_case(case: dict) -> dict:
    from megatron.training.training import get_model
    from transformers import AutoConfig

    from megatron_sip.hf.weights import export_hf_weights, load_hf_weights
    from megatron_sip.model.gpt import model_provider

    hf_config = AutoConfig.from_pretrained(case["hf_dir"])
    hf_config.dtype = getattr(torch, case["dtype"])
    initialize_megatron_for(hf_config, [*case["flags"], "--global-batch-size", "4", "--calculate-per-token-loss"])
    model = get_model(model_provider, wrap_with_ddp=True)
    load_hf_weights(model, case["hf_dir"])
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    problem = make_problem(case["problem"])
    if case["separate"]:
        loss, fillers = train_on_separate_rows(problem, model)
    else:
        loss, fillers = train_on_packed_rows(problem, model, case["row_length"], case["branches_per_row"])
    # The export knows how to put shards together: hand it the gradients as if they were the weights.
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    grads = {name: grad.clone() for name, grad in export_hf_weights(model, hf_config) if grad is not None}
    return {"loss": loss, "fillers": fillers, "grads": grads}


def main() -> None:
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare_for_cases()
    for case in cases:
        result = run_case(case)
        torch.save(result, results / f"{case['name']}.{dist.get_rank()}.pt")
        forget_megatron()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
