"""The share of a model's bfloat16 weights that one optimizer step changes: what a push of the changed ones alone would send.

    python benchmarks/changed_weights.py MODEL [--json FILE]

DPO on pairs of real text by transformers in bfloat16, as the presets do it: float32 main weights, AdamW (0.9, 0.95, decay
0.1), gradients clipped at 1.0. The main weights of a run under way lie anywhere between two bfloat16 numbers, those of one
that begins on such numbers, from which a small step does not lead away.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, write_report
from train_step_problem import Problem, make_examples
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sip.records import Example

BETA = 0.1
PAIRS = 2
REPORTED = (1, 5, 10)
CASES = {"5e-6, a run that begins": (5e-6, False), "5e-6": (5e-6, True), "5e-5": (5e-5, True), "5e-4": (5e-4, True)}
"""Learning rate, and whether the run is under way."""


def branch_logprobs(model: Any, example: Example) -> torch.Tensor:
    """Summed log-probs of the example's two branches, (2,)."""
    rows = torch.tensor([[*example.prefix_ids, *branch.ids] for branch in example.branches])
    logits = model(rows).logits[:, len(example.prefix_ids) - 1 : -1].float()
    targets = rows[:, len(example.prefix_ids) :, None]
    return logits.log_softmax(-1).gather(-1, targets).sum((1, 2))


def dpo_gradients(model: Any, reference: Any, examples: list[Example]) -> None:
    """Of the mean loss over the pairs, into the model's parameters."""
    for example in examples:
        with torch.no_grad():
            before = branch_logprobs(reference, example)
        chosen, rejected = branch_logprobs(model, example) - before
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)) / len(examples)
        loss.backward()


def main_weights(weight: torch.Tensor, under_way: bool) -> torch.Tensor:
    """float32, which round to `weight`; of a run that is under way uniformly anywhere around it."""
    if not under_way:
        return weight.float()
    generator = torch.Generator().manual_seed(0)
    spacing = torch.nextafter(weight.abs(), torch.tensor(torch.inf, dtype=weight.dtype)).float() - weight.abs().float()
    return weight.float() + spacing * (torch.rand(weight.shape, generator=generator) - 0.5) * 0.99


def changed_shares(folder: str, examples: list[Example], rate: float, under_way: bool) -> Iterator[tuple[int, float]]:
    """(step, share of the weights that it changed), step after step, each on pairs of its own."""
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    weights = list(model.parameters())
    main = [main_weights(weight.detach(), under_way).requires_grad_() for weight in weights]
    with torch.no_grad():
        for weight, master in zip(weights, main, strict=True):
            weight.copy_(master)  # rounded: at a power of two some lie beyond the middle
    adam = torch.optim.AdamW(main, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, len(examples) // PAIRS + 1):
        dpo_gradients(model, reference, examples[(step - 1) * PAIRS : step * PAIRS])
        for weight, master in zip(weights, main, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(main, 1.0)
        adam.step()
        changed = 0
        with torch.no_grad():
            for weight, master in zip(weights, main, strict=True):
                rounded = master.bfloat16()
                changed += int((rounded != weight).sum())
                weight.copy_(rounded)
        yield step, changed / sum(weight.numel() for weight in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--json", type=Path, help="where the report goes")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    problem = Problem("dpo", examples=PAIRS * max(REPORTED), prefix=64, branches=2, branch=64, row_examples=1)
    examples = make_examples(problem, tokenizer)
    shares: dict[str, dict[str, float]] = {}
    for case, (rate, under_way) in CASES.items():
        shares[case] = {}
        for step, share in changed_shares(args.model, examples, rate, under_way):
            if step in REPORTED:
                shares[case][f"step {step}"] = round(share, 5)
                print(f"{case}: step {step}: {share:.3%} of the weights changed", flush=True)
    if args.json is not None:
        setting = {"model": Path(args.model).name, "loss": problem.name, "pairs_a_step": PAIRS}
        write_report(args.json, {"machine": describe_machine(), **setting, "changed_share": shares})


if __name__ == "__main__":
    main()
