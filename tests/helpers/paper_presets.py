"""What each preset comes to, read off the paper's tables 1, 2, 6, 14 and 18: the reference of the presets' tests."""

# preset -> (objective, candidates, rollouts, asks a judge)
PAPER = {
    "quality": ("dpo", ("rollout",), 16, True),
    "factuality": ("dpo", ("rollout",), 16, True),
    "safety": ("dpo", ("suffix", "rollout"), 16, True),
    "from-scratch": ("rf-nll", ("rewrite", "rollout"), 1, True),
    "from-scratch-baseline": ("sft", ("suffix",), None, False),
    "from-scratch-rewrite": ("sft", ("rewrite",), None, False),
    "from-scratch-suffix-rewrite": ("rf-nll", ("suffix", "rewrite"), None, True),
    "safety-baseline": ("sft", ("suffix",), None, False),
    "safety-sft-rewrite": ("sft", ("rewrite",), None, False),
    "safety-sft-rollout": ("sft", ("rollout",), 1, False),
    "safety-dpo-rewrite-over-rollout": ("dpo", ("rewrite", "rollout"), 1, False),
    "safety-rf-nll-rewrite-1": ("rf-nll", ("rewrite", "rollout"), 1, True),
    "safety-rf-nll-suffix-rewrite-1": ("rf-nll", ("suffix", "rewrite", "rollout"), 1, True),
    "safety-rewrite-1": ("dpo", ("rewrite", "rollout"), 1, True),
    "safety-16": ("dpo", ("rollout",), 16, True),
    "safety-pivot-16": ("dpo", ("rollout",), 16, True),  # the pivot, the suffix, does not compete
    "quality-pivot-8": ("dpo", ("rollout",), 8, True),
    "factuality-pivot-8": ("dpo", ("rollout",), 8, True),
    **{f"safety-suffix-{k}": ("dpo", ("suffix", "rollout"), k, True) for k in (1, 2, 4, 8, 16)},
    **{f"safety-suffix-rewrite-{k}": ("dpo", ("suffix", "rewrite", "rollout"), k, True) for k in (1, 2, 4, 8, 16)},
    **{f"{goal}-{k}": ("dpo", ("rollout",), k, True) for goal in ("quality", "factuality") for k in (2, 4, 8, 16)},
}

# preset of a judge or rewriter in training (section 3.2.1) -> (tasks, longest prompt, longest answer, criteria)
TRAINED = {
    "judge": ("judgements", 3584, 512, ["label=1"]),
    "rewriter": ("rewrites", 3968, 128, ["copy=1", "rewrite=1"]),
}


def paper_criteria(preset: str) -> set[str]:
    """What a preset's judge judges: table 1's three goals; the set-ups from scratch are judged as for safety."""
    return {"quality": {"quality"}, "factuality": {"quality", "factuality"}}.get(
        preset.split("-")[0], {"quality", "safety"}
    )
