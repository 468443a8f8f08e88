"""One optimizer step of the policy on examples, over Megatron's own pipeline schedules.

    examples -> rows (packed, same plan on every rank) -> reference log-probs -> forward/backward -> optimizer

Every rank knows all examples, so the plan needs no talking; each replica trains its own rows. The number of
micro-batches varies from step to step, and the loss is divided by the step's global count of examples (DPO), target
tokens (SFT, RF-NLL, GRPO) or branches (GRPO), whatever the rows they landed in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training.training import setup_model_and_optimizer
from torch import Tensor

from megatron_sip.console import say
from megatron_sip.metrics import Mean, Metrics, merge
from megatron_sip.model.gpt import model_provider, row_logprobs
from megatron_sip.model.packing import (
    ROW_MULTIPLE,
    PackedRow,
    RowPlan,
    build_row,
    example_lengths,
    plan_rows,
    split_branches,
)
from megatron_sip.records import Example
from megatron_sip.training.leaders import LeaderExchange
from megatron_sip.training.non_finite import NON_FINITE, Attempt, as_ranges, worth_another
from megatron_sip.training.objectives.row_loss import loss_metrics, row_loss
from megatron_sip.training.objectives.settings import ObjectiveSettings
from megatron_sip.training.objectives.terms import LossTerms
from megatron_sip.training.reference_model import Reference


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A packed row on the training device, with the reference's log-probs of its targets [L] when there is one."""

    row: PackedRow
    reference_token_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """row_length: tokens that a packed row may have. global_batch_size: tasks per step, by which the schedule goes on.

    branches_per_row: of one example; it is split over rows when it has more. None: never.
    align_grad_reduce: with --overlap-grad-reduce all pipeline stages begin to reduce gradients together.
    """

    row_length: int
    global_batch_size: int
    align_grad_reduce: bool = True
    branches_per_row: int | None = None


class RowLoss(Protocol):
    """What turns a row's log-probs into its loss: `row_loss`, or a function that adds inputs of its own to it."""

    def __call__(
        self,
        settings: ObjectiveSettings,
        row: PackedRow,
        token_logprobs: Tensor,
        reference_token_logprobs: Tensor | None,
        /,
    ) -> LossTerms: ...


class PolicyTrainer:
    """The policy with its optimizer and schedule, and the step that trains it."""

    def __init__(
        self,
        settings: TrainerSettings,
        objective: ObjectiveSettings,
        exchange: LeaderExchange,
        pad_id: int,
        loss: RowLoss = row_loss,
    ) -> None:
        self.checkpointing_context: dict[str, Any] = {}
        self.model, self.optimizer, self.scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder, model_provider, checkpointing_context=self.checkpointing_context
        )
        take_fused_steps(self.optimizer.param_groups)
        self._settings = settings
        self._objective = objective
        self._loss = loss
        self._exchange = exchange
        self._pad_id = pad_id
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._connect_schedule()

    def _connect_schedule(self) -> None:
        """What Megatron's own train() sets on the model config before its first step."""
        config = get_model_config(self.model[0])
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        ddp = self.model[0].ddp_config
        if ddp.overlap_grad_reduce:
            config.no_sync_func = [chunk.no_sync for chunk in self.model]
            if self._settings.align_grad_reduce:
                config.grad_sync_func = [chunk.start_grad_sync for chunk in self.model]
            if len(self.model) == 1:
                config.no_sync_func = config.no_sync_func[0]
                config.grad_sync_func = config.grad_sync_func[0] if config.grad_sync_func else None

    def train_step(self, examples: Sequence[Example], reference: Reference | None, iteration: int) -> Metrics:
        """Update the policy, `iteration` steps old, on all replicas' `examples`; returns the step's metrics on every rank.

        Nothing is updated without examples, nor when the loss or the gradient is not finite (see `non_finite`).
        """
        if not examples:
            return {"skipped_steps": 1.0}
        plan, rows = self._pack(examples)
        return self.train_rows(examples, rows, reference, iteration) | plan_metrics(plan, len(examples))

    def train_rows(
        self, examples: Sequence[Example], rows: Sequence[PackedRow], reference: Reference | None, iteration: int
    ) -> Metrics:
        """`train_step` on this replica's rows as they are: equally long, equally many on every replica."""
        row_length = len(rows[0].tokens)
        micro_batches = [MicroBatch(row.to(self._device)) for row in rows]
        started = time.monotonic()
        if reference is not None:
            with reference.active() as chunks:
                micro_batches = self._with_reference(chunks, micro_batches, row_length)
        referenced = time.monotonic()
        metrics = self._update(examples, micro_batches, row_length, iteration)
        metrics["seconds/reference"] = referenced - started
        metrics["seconds/train"] = time.monotonic() - referenced
        return metrics

    def _pack(self, examples: Sequence[Example]) -> tuple[RowPlan, list[PackedRow]]:
        if self._settings.branches_per_row is not None:
            examples = split_branches(examples, self._settings.branches_per_row)
        tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
        plan = plan_rows(
            example_lengths(examples),
            self._settings.row_length,
            self._exchange.num_replicas,
            multiple_of=math.lcm(ROW_MULTIPLE[self._device.type], tensor_parallel),
        )
        mine = plan.rows[self._exchange.replica]
        return plan, [build_row(examples, indices, plan.row_length, self._pad_id) for indices in mine]

    @torch.no_grad()
    def _with_reference(
        self, reference: list[Any], micro_batches: list[MicroBatch], row_length: int
    ) -> list[MicroBatch]:
        """The same micro-batches with the reference's log-probs (present on the last pipeline stage)."""
        found = get_forward_backward_func()(
            forward_step_func=_forward_reference,
            data_iterator=_iterators(micro_batches, reference),
            model=reference,
            num_microbatches=len(micro_batches),
            seq_length=row_length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return micro_batches
        return [MicroBatch(batch.row, logprobs) for batch, logprobs in zip(micro_batches, found, strict=True)]

    def _update(
        self, examples: Sequence[Example], micro_batches: list[MicroBatch], row_length: int, iteration: int
    ) -> Metrics:
        """Passes over the examples until one updates the policy, or the step has to be skipped."""
        self.scheduler.num_steps = iteration * self._settings.global_batch_size  # whatever became of steps before
        self.scheduler.step(0)
        attempts: list[Attempt] = []
        while not attempts or worth_another(attempts):
            metrics = self._accumulate_gradients(micro_batches, row_length)
            loss = metrics["loss"]
            assert isinstance(loss, Mean)
            attempts.append(self._try_step(loss.value))
        metrics["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        self.scheduler.step(increment=self._settings.global_batch_size)
        if get_model_config(self.model[0]).fp16:
            failed = sum(attempt.trouble is not None for attempt in attempts)
            metrics |= {"loss_scale": attempts[-1].scale, "overflows": float(failed)}
        last = attempts[-1]
        if last.trouble is None:
            assert last.grad_norm is not None
            return metrics | {"grad_norm": last.grad_norm}
        if dist.get_rank() == 0:
            tasks = as_ranges(example.task_index for example in examples)
            say(f"step {iteration + 1} skipped: {last.trouble}; its tasks: {tasks}")
        return metrics | {"skipped_steps": 1.0, NON_FINITE: 1.0}

    def _accumulate_gradients(self, micro_batches: list[MicroBatch], row_length: int) -> Metrics:
        """One forward and backward pass; the loss and its metrics over all replicas, on every rank."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output = row_logprobs(chunk, batch.row)

            def loss_function(token_logprobs: Tensor) -> tuple[Tensor, Tensor, LossTerms]:
                terms = self._loss(self._objective, batch.row, token_logprobs, batch.reference_token_logprobs)
                count = torch.tensor(terms.count, dtype=torch.int)  # on the host: a device would be waited for
                # Pipeline schedules free the loss tensor's memory once it was differentiated: keep a copy to report.
                return terms.sum, count, replace(terms, sum=terms.sum.detach().clone())

            return output, loss_function

        parts = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=_iterators(micro_batches, self.model),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=row_length,
            micro_batch_size=1,
            forward_only=False,
        )
        return merge(self._exchange.all_gather_from_last_stages(loss_metrics(parts)))

    @torch.no_grad()
    def _try_step(self, loss: float) -> Attempt:
        """Megatron's own optimizer step, but for a look at loss and gradient before anything is updated."""
        scale = float(self.optimizer.get_loss_scale())
        norm: float | None = None
        if not math.isfinite(loss):
            trouble = f"the loss is {loss}"
        elif self.optimizer.prepare_grads():  # in float16 this lowers the loss scale
            trouble = f"the gradient overflows float16 at a loss scale of {scale:g}"
        else:
            norm = float(self.optimizer.get_grad_norm())
            trouble = "" if math.isfinite(norm) else f"the gradient norm is {norm}"
        if self._exchange.any_rank(bool(trouble)):  # no rank may go on alone
            next_scale = float(self.optimizer.get_loss_scale())
            return Attempt(trouble or "the gradient of another rank is not finite", None, scale, next_scale)
        assert norm is not None
        clip_gradients(self.optimizer, norm)
        self.optimizer.step_with_ready_grads()
        return Attempt(None, norm, scale, scale)


def clip_gradients(optimizer: Any, norm: float) -> None:
    """Scale the gradients of a chained optimizer, whose norm is `norm`, down to --clip-grad, as its own `step` does."""
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, use_decoupled_grad=decoupled)


def take_fused_steps(param_groups: Sequence[dict[str, Any]]) -> None:
    """On CPU let torch's optimizer take one pass over memory: unfused, Adam takes a dozen.

    Its groups have an entry `fused`. On a GPU the steps that a checkpoint holds would have to move to the device first.
    """
    for group in param_groups:
        if "fused" in group and not group.get("capturable") and all(p.device.type == "cpu" for p in group["params"]):
            group.update(fused=True, foreach=False)


def has_stepped(optimizer: Any) -> bool:
    """Whether a chained optimizer has made a step, and so has a state that a checkpoint can give back."""
    return any(part.optimizer.state for part in optimizer.chained_optimizers if not part.is_stub_optimizer)


def _forward_reference(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
    def kept(token_logprobs: Tensor, non_loss_data: bool = True) -> Tensor:
        return token_logprobs.clone()  # pipeline schedules may free what a stage has put out

    return row_logprobs(chunk, next(iterator).row), kept


def _iterators(micro_batches: list[MicroBatch], model: list[Any]) -> Any:
    """One iterator per virtual pipeline chunk, as Megatron's schedules expect."""
    iterators = [iter(micro_batches) for _ in model]
    return iterators[0] if len(iterators) == 1 else iterators


def plan_metrics(plan: RowPlan, examples: int) -> Metrics:
    """What packing did in this step."""
    computed = plan.tokens + plan.padding
    return {
        "examples": float(examples),
        "packing/rows": float(sum(len(replica) for replica in plan.rows)),
        "packing/row_length": float(plan.row_length),
        "packing/tokens": float(plan.tokens),
        "packing/unshared_tokens": float(plan.unshared_tokens),
        "packing/waste": Mean(float(plan.padding), float(computed)),
        "packing/cut_tokens": float(plan.cut_tokens),
    }
