"""A row's loss needs nothing that a GPU's host would wait for: no value, no shape that depends on values, no second copy.

Tensors without values stand for those of a GPU: whoever asks for a value gets an error. Under `FakeTensorMode` they say that
they are on CUDA, so that its branches are taken, but have no backward; on the device `meta` they have.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from host_reads import HostReads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_sip.kernels import logprob_reference
from megatron_sip.kernels.fp32_lm_head import fp32_lm_head
from megatron_sip.kernels.linear_logprob import linear_token_logprobs
from megatron_sip.kernels.logprob import token_logprobs
from megatron_sip.kernels.tree_attention.flex import row_mask
from megatron_sip.model.packing import PackedRow, build_row
from megatron_sip.records import Branch, Example
from megatron_sip.training.objectives.row_loss import loss_metrics, row_loss
from megatron_sip.training.objectives.settings import ObjectiveSettings

VOCABULARY, HIDDEN = 101, 16
OBJECTIVES = {
    "dpo": ObjectiveSettings("dpo", nll_coef=0.1, label_smoothing=0.1),
    "ipo": ObjectiveSettings("dpo", dpo_loss="ipo"),
    "sft": ObjectiveSettings("sft"),
    "grpo, token": ObjectiveSettings("grpo", kl_coef=0.1),
    "grpo, sequence": ObjectiveSettings("grpo", grpo_length="sequence", mismatch_correction="mask"),
    "grpo, constant": ObjectiveSettings("grpo", grpo_length="constant", mismatch_correction="none"),
}


def make_row(objective: str) -> PackedRow:
    roles = ["target", "target"] if objective == "sft" else ["chosen", "rejected"]
    examples = [
        Example(
            task,
            list(range(1, 9 + task)),
            [
                Branch([1, 2, 3], roles[0], "rollout", advantage=0.5, engine_logprobs=[-1.0, -2.0, -3.0]),  # type: ignore[arg-type]
                Branch([4, 5], roles[1], "suffix", advantage=-0.5),  # type: ignore[arg-type]
            ],
        )
        for task in range(3)
    ]
    return build_row(examples, range(3), 64, 0)


def in_a_thread(run: Callable[[], HostReads]) -> HostReads:
    """One of its own: in a test's, Megatron's names for CUDA may have come to mean the CPU."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def logits_then_logprobs(hidden: Tensor, weight: Tensor, row: PackedRow) -> Tensor:
    return token_logprobs(fp32_lm_head(hidden, weight), row.logit_rows, row.targets)


def chunks_of_logprobs(hidden: Tensor, weight: Tensor, row: PackedRow) -> Tensor:
    return linear_token_logprobs(hidden, weight, row.logit_rows, row.targets, chunk_columns=40)


@pytest.mark.parametrize("head", [logits_then_logprobs, chunks_of_logprobs])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_on_cuda_is_one_copy_and_nothing_is_read_back(
    name: str, head: Callable[[Tensor, Tensor, PackedRow], Tensor]
) -> None:
    def last_stage() -> HostReads:
        row = make_row(name)
        with FakeTensorMode(allow_non_fake_inputs=True), HostReads() as log:
            moved = row.to("cuda")
            states = torch.empty(64, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            row_mask(moved.layout, 64)
            logprobs = head(states.index_select(0, moved.predictor_positions), weight, moved)
            terms = row_loss(OBJECTIVES[name], moved, logprobs, logprobs.detach())
        assert terms.sum.device.type == "cuda"
        return log

    log = in_a_thread(last_stage)
    assert log.copies == [("cpu", "cuda")]
    assert not log.reads


@pytest.mark.parametrize("head", [logits_then_logprobs, chunks_of_logprobs])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_backward_asks_for_no_value_either(name: str, head: Callable[[Tensor, Tensor, PackedRow], Tensor]) -> None:
    row, log = make_row(name).to("meta"), HostReads()
    states = torch.empty(64, HIDDEN, device="meta", requires_grad=True)
    weight = torch.empty(VOCABULARY, HIDDEN, device="meta", requires_grad=True)
    with log:
        logprobs = head(states.index_select(0, row.predictor_positions), weight, row)
        row_loss(OBJECTIVES[name], row, logprobs, logprobs.detach()).sum.backward()
    assert states.grad is not None
    assert weight.grad is not None
    assert not log.reads
    assert not log.copies


def test_nor_do_the_kernels_in_plain_torch_that_run_where_none_are_built() -> None:
    def fallback() -> HostReads:
        with FakeTensorMode(), HostReads() as log:
            logits, entries = torch.empty(6, 40, device="cuda"), torch.empty(9, device="cuda", dtype=torch.int64)
            floats = torch.empty(9, device="cuda", dtype=torch.float64)
            _, sums = logprob_reference.row_statistics(logits, 37)
            logprob_reference.gradient_(logits, entries, entries, floats, sums, floats, 5, 37)
        return log

    log = in_a_thread(fallback)
    assert not log.reads
    assert not log.copies


def test_metrics_of_all_rows_are_fetched_in_one_copy() -> None:
    settings = OBJECTIVES["dpo"]
    row = make_row("dpo")
    rows = [row_loss(settings, row, torch.full((15,), -float(n)), torch.full((15,), -2.0)) for n in (1, 2, 3)]
    alone, log = [loss_metrics([terms]) for terms in rows], HostReads()
    with log:
        together = loss_metrics(rows)
    assert sum(log.reads.values()) == 0  # `tolist` of one tensor is none of them
    assert together["loss"].total == sum(metrics["loss"].total for metrics in alone)  # type: ignore[union-attr]
    assert together["pairs"] == 9


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t[t > 0],
        lambda t: t.sum().item(),
        lambda t: t.masked_select(t > 0),
        lambda t: torch.arange(3).repeat_interleave(t),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
    ],
)
def test_what_is_looked_for_is_seen(wait: Callable[[Tensor], object]) -> None:
    with HostReads() as log:
        wait(torch.tensor([1, 2, 0]))
    assert sum(log.reads.values()) == 1
