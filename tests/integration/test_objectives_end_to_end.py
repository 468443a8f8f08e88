"""SFT, RF-NLL, DPO and GRPO: a trainer step's loss and gradients equal those of a transformers model and plain formulas."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from workers import TINY_LLAMA, run_worker, save_tiny_llama

VOCABULARY = TINY_LLAMA["vocab_size"]
WORKER = Path(__file__).with_name("objectives_worker.py")
BETA, NLL_COEF = 0.1, 0.2
ROW_LENGTH = 160
"""The worker's."""


def make_examples(roles: list[str], seed: int) -> list[dict]:
    """With a prefix longer than a row, branches of one token, one twice in a group, and an example twice in a step."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

    examples: list[dict] = [
        {
            "task_index": task,
            "prefix_ids": ids(5, 60),
            "branches": [{"ids": ids(3, 25), "role": role, "kind": "suffix"} for role in roles],
        }
        for task in range(6)
    ]
    examples[1]["prefix_ids"] = ids(ROW_LENGTH + 10, ROW_LENGTH + 40)
    for branch in examples[2]["branches"]:
        branch["ids"] = ids(1, 1)
    twice = ids(4, 9)
    for branch in examples[3]["branches"]:
        branch["ids"] = twice
    return [*examples, examples[4]]


def make_groups(seed: int) -> list[dict]:
    """Groups of 4 rollouts with advantages, and engine log-probs from near those of a random model to far from them."""
    rng = random.Random(seed)
    examples = make_examples(["sampled"] * 4, seed)
    examples[1]["prefix_ids"] = examples[0]["prefix_ids"]  # parts of a split group would cut one that is too long less
    for example in examples:
        for branch in example["branches"]:
            branch["kind"] = "rollout"
            branch["advantage"] = rng.uniform(-1, 1)
            branch["engine_logprobs"] = [rng.uniform(-7.0, -3.0) for _ in branch["ids"]]
    return examples


def prefix_in_a_row(example: dict) -> list[int]:
    """Its end, as far as a row has room for it beside the branches."""
    return example["prefix_ids"][-(ROW_LENGTH - sum(len(branch["ids"]) for branch in example["branches"])) :]


def make_documents(seed: int) -> list[dict]:
    """As --sft-target document makes them: every token but the first is learnt; two texts of a row's length, one of two."""
    rng = random.Random(seed)
    texts = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (ROW_LENGTH, 40, 2, ROW_LENGTH, 77)]
    return [
        {
            "task_index": task,
            "prefix_ids": ids[:1],
            "branches": [{"ids": ids[1:], "role": "target", "kind": "suffix"}],
        }
        for task, ids in enumerate(texts)
    ]


DPO = {"objective": "dpo", "beta": BETA, "nll_coef": NLL_COEF}
BY_TOKEN = {"objective": "grpo"}
BY_SEQUENCE = {"objective": "grpo", "grpo_length": "sequence", "kl_coef": 0.1, "mismatch_correction": "none"}
BY_CONSTANT = {"objective": "grpo", "grpo_length": "constant", "grpo_constant": 25, "mismatch_correction": "mask"}
PROBLEMS: dict[str, tuple[dict[str, Any], list[dict]]] = {
    "sft": ({"objective": "sft"}, make_examples(["target"], 0)),
    "sft of documents": ({"objective": "sft"}, make_documents(5)),
    "rf-nll": ({"objective": "rf-nll"}, make_examples(["target"], 1)),
    "dpo": (DPO, make_examples(["chosen", "rejected"], 2)),
    "dpo with chunked logits": (DPO, make_examples(["chosen", "rejected"], 4)),
    "dpo with offloaded reference": (DPO, make_examples(["chosen", "rejected"], 3)),
    "grpo by token": (BY_TOKEN, make_groups(5)),
    "grpo by token split over rows": (BY_TOKEN, make_groups(5)),
    "grpo by sequence": (BY_SEQUENCE, make_groups(6)),
    "grpo by constant": (BY_CONSTANT, make_groups(7)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("objectives")
    return save_tiny_llama(folder / "policy", 1), save_tiny_llama(folder / "reference", 2)


@pytest.fixture(scope="module")
def results(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    work = tmp_path_factory.mktemp("work")
    (work / "examples.json").write_text(json.dumps(PROBLEMS))
    run_worker(WORKER, *folders, work / "examples.json", work / "result.pt")
    return torch.load(work / "result.pt")


def branch_logprobs(model: LlamaForCausalLM, prefix: list[int], branch: list[int]) -> Tensor:
    logits = model(torch.tensor([prefix + branch])).logits[0, len(prefix) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(branch)[:, None])[:, 0]


def nll_loss(policy: LlamaForCausalLM, reference: LlamaForCausalLM, examples: list[dict]) -> Tensor:
    logprobs = [branch_logprobs(policy, prefix_in_a_row(e), e["branches"][0]["ids"]) for e in examples]
    return -torch.cat(logprobs).mean()


def next_token_loss(policy: LlamaForCausalLM, reference: LlamaForCausalLM, examples: list[dict]) -> Tensor:
    """transformers' own loss of each document, unpacked, a token's share each."""
    documents = [torch.tensor([e["prefix_ids"] + e["branches"][0]["ids"]]) for e in examples]
    total = torch.stack([policy(ids, labels=ids).loss * (ids.numel() - 1) for ids in documents]).sum()
    return total / sum(ids.numel() - 1 for ids in documents)


def dpo_loss(policy: LlamaForCausalLM, reference: LlamaForCausalLM, examples: list[dict]) -> Tensor:
    losses = []
    for example in examples:
        prefix, branches = prefix_in_a_row(example), [branch["ids"] for branch in example["branches"]]
        chosen, rejected = (branch_logprobs(policy, prefix, branch) for branch in branches)
        with torch.no_grad():
            base = [branch_logprobs(reference, prefix, branch).sum() for branch in branches]
        margin = (chosen.sum() - base[0]) - (rejected.sum() - base[1])
        loss = -torch.nn.functional.logsigmoid(BETA * margin) - NLL_COEF * chosen.mean()
        losses.append(loss)
    return torch.stack(losses).mean()


def correction(how: str, gap: float) -> float:
    """Of a token whose trainer and engine log-probs differ by `gap`."""
    ratio = math.exp(gap)
    return {"none": 1.0, "truncate": min(ratio, 2.0), "mask": ratio if 0.5 <= ratio <= 5.0 else 0.0}[how]


def grpo_loss(
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    examples: list[dict],
    *,
    objective: str,
    grpo_length: str = "token",
    grpo_constant: int = 0,
    kl_coef: float = 0.0,
    mismatch_correction: str = "truncate",
) -> Tensor:
    """On policy: the ratio is 1, and its gradient the log-prob's."""
    losses, tokens = [], 0
    for example in examples:
        prefix = prefix_in_a_row(example)
        for branch in example["branches"]:
            logprobs = branch_logprobs(policy, prefix, branch["ids"])
            gaps = (logprobs.detach() - torch.tensor(branch["engine_logprobs"])).tolist()
            weights = torch.tensor([correction(mismatch_correction, gap) for gap in gaps])
            terms = -(logprobs - logprobs.detach()).exp() * weights * branch["advantage"]
            with torch.no_grad():
                base = branch_logprobs(reference, prefix, branch["ids"])
            terms = terms + kl_coef * ((base - logprobs).exp() - (base - logprobs) - 1)
            divisor = {"token": 1, "sequence": len(gaps), "constant": grpo_constant}[grpo_length]
            losses.append(terms.sum() / divisor)
            tokens += len(gaps)
    return torch.stack(losses).sum() / (tokens if grpo_length == "token" else len(losses))


LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo_loss, "grpo": grpo_loss}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_step_equals_transformers(results: dict, folders: tuple[Path, Path], problem: str) -> None:
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    constants, examples = PROBLEMS[problem]
    plain = next_token_loss if "documents" in problem else LOSSES.get(constants["objective"], nll_loss)
    loss = plain(policy, reference, examples, **(constants if plain is grpo_loss else {}))
    loss.backward()
    found = results[problem]
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found["gradients"][name] - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-5, name
