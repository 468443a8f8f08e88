"""What `train_step.py` trains on: token-exact examples of two shapes, and the arithmetic they need."""

from __future__ import annotations

import pydoc_data.topics
import random
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sip.records import Branch, Example, Role


@dataclass(frozen=True)
class Problem:
    """A step's examples: equally long prefixes and branches."""

    objective: Literal["dpo", "grpo"]
    examples: int
    prefix: int
    branches: int
    branch: int
    row_examples: int
    """Examples in a micro-batch, packed or not."""

    @property
    def name(self) -> str:
        return f"{self.objective} {self.examples} x ({self.prefix} + {self.branches} x {self.branch})"

    @property
    def needs_reference(self) -> bool:
        """DPO has a reference pass; GRPO here has no KL term and is on-policy, so it has none."""
        return self.objective == "dpo"

    def tokens(self, packed: bool) -> int:
        """Tokens that the layers see."""
        prefixes = 1 if packed else self.branches
        return self.examples * (prefixes * self.prefix + self.branches * self.branch)

    def scores(self, packed: bool) -> int:
        """Query-key pairs of one head."""
        branches = self.branches * (self.branch * (self.branch + 1) // 2 + self.branch * self.prefix)
        prefixes = (1 if packed else self.branches) * self.prefix * (self.prefix + 1) // 2
        return self.examples * (prefixes + branches)

    def projected(self, packed: bool) -> int:
        """Hidden states that predict a branch token: what is projected on the vocabulary."""
        first = 1 if packed else self.branches
        return self.examples * (first + self.branches * (self.branch - 1))


PROBLEMS = {
    "dpo": Problem("dpo", examples=4, prefix=896, branches=2, branch=128, row_examples=2),
    "grpo": Problem("grpo", examples=1, prefix=1024, branches=16, branch=512, row_examples=1),
}
"""What `train_step.py` compares on a CPU."""
PAPER = Problem("dpo", examples=16, prefix=1920, branches=2, branch=128, row_examples=4)
"""The paper's lengths: documents of 2,048 tokens, suffixes of 128."""


def step_flops(problem: Problem, packed: bool, hf_config: Any) -> float:
    """Floating-point operations of one step's matrix products: a multiply-add is two; backward is twice the forward,
    attention's 2.5 times (it computes the scores again); nothing for norms, softmax and optimizer."""
    heads, key_heads, layers = hf_config.num_attention_heads, hf_config.num_key_value_heads, hf_config.num_hidden_layers
    hidden, head_dim = hf_config.hidden_size, hf_config.head_dim
    layer_weights = 2 * hidden * head_dim * (heads + key_heads) + 3 * hidden * hf_config.intermediate_size
    products = 2 * layers * layer_weights * problem.tokens(packed)
    products += 2 * hidden * hf_config.vocab_size * problem.projected(packed)
    attention = 4 * layers * heads * head_dim * problem.scores(packed)
    passes = 1 if problem.needs_reference else 0
    return float((3 + passes) * products + (3.5 + passes) * attention)


def random_examples(problem: Problem, vocab_size: int, seed: int = 0) -> list[Example]:
    """Examples of made-up token ids: chosen and rejected branches alike have engine log-probs, as rollouts have."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return rng.choices(range(vocab_size), k=count)

    roles: list[Role] = ["chosen", "rejected"] if problem.objective == "dpo" else ["sampled"] * problem.branches
    engine = [-10.0] * problem.branch
    return [
        Example(
            index,
            ids(problem.prefix),
            [Branch(ids(problem.branch), role, "rollout", (-1.0) ** place, engine) for place, role in enumerate(roles)],
        )
        for index in range(problem.examples)
    ]


def make_examples(problem: Problem, tokenizer: Any) -> list[Example]:
    """Python's language reference, cut up: the first branch continues its prefix, the others are from elsewhere."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = problem.prefix + problem.branches * problem.branch
    needed = problem.examples * length
    if len(ids) < needed:
        raise ValueError(f"the text has {len(ids)} tokens, the examples need {needed}")
    elsewhere = len(ids) // 2
    roles: list[Role] = ["chosen", "rejected"] if problem.objective == "dpo" else ["target"] * problem.branches
    examples = []
    for index in range(problem.examples):
        start = index * length
        prefix_end = start + problem.prefix
        starts = [prefix_end]
        starts += [
            elsewhere + (index * problem.branches + other) * problem.branch for other in range(1, problem.branches)
        ]
        # Made-up advantages alternate, so that every group's mean is 0.
        branches = [
            Branch(ids[first : first + problem.branch], role, "suffix", advantage=(-1.0) ** place)
            for place, (first, role) in enumerate(zip(starts, roles, strict=True))
        ]
        examples.append(Example(index, ids[start:prefix_end], branches))
    return examples
