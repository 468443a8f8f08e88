"""What a step's log shows of thoughts, where the tasks are places for them (the paper's later version)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from megatron_sip.metrics import Mean, Metrics
from megatron_sip.records import Group, Thinking

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, as the rollouts' texts were made."""


def thought_metrics(groups: Sequence[Group], decode: Decode) -> Metrics:
    """Of the rollouts of `Thinking` tasks, nothing for others.

    thought/length: tokens up to the end mark, it included, of the thoughts that end. thought/ended: the share that do.
    thought/reward: mean score of the rollouts that have one.
    """
    thinking = [(group, group.task.label.end_mark) for group in groups if isinstance(group.task.label, Thinking)]
    if not thinking:
        return {}
    lengths: list[int] = []
    rewards: list[float] = []
    rollouts = 0
    for group, mark in thinking:
        for place, candidate in enumerate(group.candidates):
            if candidate.kind != "rollout":
                continue
            rollouts += 1
            if mark in candidate.text:
                lengths.append(tokens_through(mark, candidate.ids, decode))
            if group.scores is not None and group.dropped is None:
                rewards.append(group.scores[place])
    return {
        "thought/length": Mean(float(sum(lengths)), float(len(lengths))),
        "thought/ended": Mean(float(len(lengths)), float(rollouts)),
        "thought/reward": Mean(math.fsum(rewards), float(len(rewards))),
    }


def tokens_through(mark: str, ids: Sequence[int], decode: Decode) -> int:
    """How many of the first tokens are needed for a text with `mark` in it; ValueError if all are too few.

    Found by halving: a dozen decodings of a thousand tokens, none of them asks the tokenizer where a token begins.
    """
    count = bisect_left(range(len(ids) + 1), True, key=lambda count: mark in decode(ids[:count]))
    if count > len(ids):
        raise ValueError(f"{mark!r} is not in the text of these {len(ids)} tokens")
    return count
