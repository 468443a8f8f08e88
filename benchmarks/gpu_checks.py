"""Is it right, on the device that is there? One check a process, for `gpu_day.py` and for compute-sanitizer.

    python benchmarks/gpu_checks.py op|attention|step|syncs|machine [--dtype float32|bfloat16] [--json FILE]

op: log-probs and their gradient against float64. attention: the device's own way over prefix trees, and on a GPU flash
attention's, forward and backward against a dense mask in float64. step: log-probs, loss and gradient norm of a DPO step of a
tiny Llama against transformers in float64 on separate rows. syncs: a step of three rows makes the host wait for a GPU as often
as one of one row does (counted on a GPU only). machine: what is there, and how fast it multiplies and copies.

Ends with an error where an error is above its bound; the JSON holds the largest ones.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_flash import FlashTreeAttention
from machine import copy_bandwidth, describe_machine, gemm_peak, write_report
from torch import Tensor
from torch.nn.functional import logsigmoid
from train_step_problem import Problem, random_examples
from train_step_variant import BETA, DEVICE, build_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sip.kernels.extension import compiled_devices
from megatron_sip.kernels.logprob import token_logprobs
from megatron_sip.kernels.tree_attention.cpu import tree_attention_cpu
from megatron_sip.kernels.tree_attention.dense import tree_attention_dense
from megatron_sip.kernels.tree_attention.flex import FlexTreeAttention
from megatron_sip.metrics import flatten
from megatron_sip.model.packing import build_row
from megatron_sip.planning.devices import DEVICES
from megatron_sip.records import Example

PACKAGES = (
    *("megatron-core", "transformers", "triton", "transformer-engine", "liger-kernel", "flash-attn"),
    *("cut-cross-entropy", "sglang"),
)
LOGPROB = 1e-5
"""Nats that a log-prob may be off by, of any number format of the logits."""
RELATIVE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of the largest value of a tensor, by the number format of the inputs; of a step's loss and gradient norm too."""
LAYOUT = ((300, (64, 64)), (1, (5,)), (130, (128, 1, 40)))
"""Prefixes and branches of the attention check; 27 tokens of padding follow."""
TINY = Problem("dpo", examples=3, prefix=40, branches=2, branch=12, row_examples=1)
SHAPE = LlamaConfig(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=256, tie_word_embeddings=False,
    initializer_range=0.2,
)  # fmt: skip
APART = 0.3
"""The reference's distance from the policy, as a share of a weight's spread."""


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max())


def check_op(_: torch.dtype) -> dict[str, float]:
    """Rows that predict several tokens and none, odd widths, padding columns; largest errors by number format."""
    require_kernels(compiled_devices(), DEVICE)
    errors: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width, vocabulary in ((32064, 32000), (1001, 1001), (128256, 128256)):
            generator = torch.Generator().manual_seed(width)
            logits = (4 * torch.randn(40, width, generator=generator)).to(DEVICE, dtype)
            rows = torch.randint(0, 38, (90,), generator=generator).to(DEVICE)
            targets = torch.randint(0, vocabulary, (90,), generator=generator).to(DEVICE)
            weights = torch.linspace(-1, 1, 90, dtype=torch.float64, device=DEVICE)
            wide = logits.double().requires_grad_()
            exact = wide[:, :vocabulary].log_softmax(-1)[rows, targets]
            (exact * weights).sum().backward()
            leaf = logits.detach().requires_grad_()
            ours = token_logprobs(leaf * 1, rows, targets, vocab_size=vocabulary)  # the product is the op's to consume
            (ours * weights).sum().backward()
            assert wide.grad is not None
            assert leaf.grad is not None
            found = {
                "log-prob, nats": float((ours.double() - exact).abs().max()),
                "gradient": relative_error(leaf.grad, wide.grad),
            }
            for name, value in found.items():
                key = f"{name}, {dtype}".replace("torch.", "")
                errors[key] = max(errors.get(key, 0.0), value)
            require(found["log-prob, nats"] <= LOGPROB, f"log-probs of {dtype} [40, {width}] are off by {found}")
            require(found["gradient"] <= RELATIVE.get(dtype, 3e-2), f"gradients of {dtype} [40, {width}]: {found}")
    return errors


def check_attention(dtype: torch.dtype) -> dict[str, float]:
    """Largest relative errors of the output and of each gradient, by way."""
    ways: dict[str, Callable[..., Tensor]] = {"own": tree_attention_cpu if DEVICE == "cpu" else FlexTreeAttention()}
    if DEVICE == "cuda" and dtype == torch.bfloat16:
        ways["flash"] = FlashTreeAttention()
    lines, end = [], 0
    for prefix, branches in LAYOUT:
        start, end = end, end + prefix
        prefix_end = end
        for size in branches:
            lines.append([start, prefix_end, end, end + size])
            end += size
    layout = torch.tensor(lines, dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    heads = (8, 2, 2)
    rounded = [torch.randn(end + 27, count, 64, generator=generator).to(DEVICE, dtype) for count in heads]
    grad = torch.randn(end + 27, heads[0], 64, generator=generator).to(DEVICE, dtype)

    def results(attention: Callable[..., Tensor], wanted: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(wanted).requires_grad_() for tensor in rounded]
        output = attention(*inputs, layout, 0.125)
        return [output.detach(), *torch.autograd.grad(output, inputs, grad.to(wanted))]

    exact = results(tree_attention_dense, torch.float64)
    errors: dict[str, float] = {}
    for way, attention in ways.items():
        for name, ours, right in zip(
            ("output", "query", "key", "value"), results(attention, dtype), exact, strict=True
        ):
            errors[f"{way}, {name}"] = relative_error(ours, right)
    require(max(errors.values()) <= RELATIVE[dtype], f"attention in {dtype}: {errors}")
    return errors


def policy_and_reference() -> tuple[Any, Any]:
    """Tiny models of weights that bfloat16 holds, and not alike. Their predictions are sharp: a wrong mask shows."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(SHAPE)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += APART * parameter.std() * torch.randn_like(parameter)
        for parameter in (*policy.parameters(), *reference.parameters()):  # not the frequencies of positions
            parameter.copy_(parameter.bfloat16())
    return policy, reference


def branch_logprobs(model: Any, examples: Sequence[Example]) -> Tensor:
    """[examples, 2]: the branches' log-probs, each in a row of its own."""
    sums = []
    for example in examples:
        for branch in example.branches:
            ids = torch.tensor([example.prefix_ids + branch.ids])
            logprobs = model(ids).logits[0, len(example.prefix_ids) - 1 : -1].log_softmax(-1)
            sums.append(logprobs.gather(1, torch.tensor(branch.ids)[:, None]).sum())
    return torch.stack(sums).view(-1, 2)


Logprobs = Callable[[Any, Sequence[Example]], Tensor]


def exact_step(
    policy: Any, reference: Any, examples: Sequence[Example], logprobs_of: Logprobs = branch_logprobs
) -> dict[str, float]:
    """What a DPO step reports, by transformers in float64."""
    logprobs = logprobs_of(policy.double(), examples)
    ratios = logprobs - logprobs_of(reference.double(), examples).detach()
    loss = -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
    policy.zero_grad()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in policy.parameters()]).norm()
    chosen, rejected = logprobs.mean(0)
    values = {"loss": loss, "grad_norm": norm, "chosen_logprob": chosen, "rejected_logprob": rejected}
    return {name: float(value.detach()) for name, value in values.items()}


def step_errors(found: Mapping[str, float], exact: Mapping[str, float]) -> dict[str, float]:
    return {name: abs(found[name] - value) / abs(value) for name, value in exact.items()}


def check_step(dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of what a step reports."""
    policy, other = policy_and_reference()
    examples = random_examples(TINY, SHAPE.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("policy", policy), ("reference", other)):
            model.save_pretrained(Path(folder, name))
        trainer, reference, _ = build_trainer(Path(folder, "reference"), TINY, 1, dtype=dtype)
        from megatron_sip.hf.weights import load_hf_weights

        load_hf_weights(trainer.model, Path(folder, "policy"))
    trainer.optimizer.reload_model_params()
    ours = flatten(trainer.train_step(examples, reference, 0))
    exact = exact_step(policy, other, examples)
    errors = step_errors(ours, exact)
    require(max(errors.values()) <= RELATIVE[dtype], f"a step in {dtype}: {ours} for {exact}")
    return errors


def check_syncs(dtype: torch.dtype) -> dict[str, Any]:
    """How often the host waits in steps of one and of three rows."""
    examples = random_examples(TINY, SHAPE.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        SHAPE.save_pretrained(folder)
        trainer, reference, pad_id = build_trainer(Path(folder), TINY, 4, made_up=True, dtype=dtype)
    rows = [build_row(examples, [index], 128, pad_id) for index in range(3)]
    for _ in range(2):  # compiling, and the optimizer's state
        trainer.train_rows(examples, rows, reference, 0)
    waits = {
        count: waits_of(lambda c=count: trainer.train_rows(examples[:c], rows[:c], reference, 0)) for count in (1, 3)
    }
    places = sorted({place for found in waits.values() for place in found})
    counts = {f"{count} rows": len(found) for count, found in waits.items()}
    require(len(waits[3]) == len(waits[1]), f"waits grow with rows: {counts}, at {places}")
    return counts | {"counted": DEVICE == "cuda"}


def waits_of(step: Callable[[], object]) -> list[str]:
    """File and line of each time that the host waited for the GPU; nothing without one."""
    if DEVICE == "cpu":
        step()
        return []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def describe(dtype: torch.dtype) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    facts = {"versions": versions, "kernels": compiled_devices(), "gemm_peak_flops": gemm_peak(dtype, DEVICE)}
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
        facts["sheet_flops"] = next((device.flops for kind, device in DEVICES.items() if kind in name), None)
    return describe_machine(DEVICE) | facts | {"copy_bandwidth_gb_s": copy_bandwidth(DEVICE) / 1e9}


def require_kernels(compiled: Sequence[str], device: str) -> None:
    """Without kernels for the device torch's own way would be checked and measured in their place."""
    require(device.upper() in compiled, f"megatron_sip._kernels holds none for {device}, but for {', '.join(compiled)}")


def require(holds: bool, trouble: str) -> None:
    if not holds:
        raise SystemExit(trouble)


CHECKS = {"op": check_op, "attention": check_attention, "step": check_step, "syncs": check_syncs, "machine": describe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="where the report goes")
    args = parser.parse_args()
    report = CHECKS[args.check](getattr(torch, args.dtype))
    print(report)
    if args.json:
        write_report(args.json, report)


if __name__ == "__main__":
    main()
