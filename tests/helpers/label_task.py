"""A labelled task that a tiny model learns in some tens of steps: which of two words is among others?"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megatron_sip.data.labelled import LabelledSource, open_records
from megatron_sip.judge.encoding import ChatEncoder
from megatron_sip.judge.labelled_tasks import LabelledSettings, make_writer

PROMPT = """+++
name = "colour"
version = 1
kind = "pointwise"
pattern = 'COLOUR:\\s*(A|B)'
start = "COLOUR: "
[values]
A = 1.0
B = 0.0
+++
{{candidate}}

End with COLOUR: A or COLOUR: B.
"""
WORDS = {"A": "red", "B": "blue"}
FILLING = (
    "the",
    "of",
    "and",
    "in",
    "to",
    "is",
    "was",
    "for",
    "on",
    "at",
    "by",
    "from",
    "with",
    "as",
    "it",
    "his",
    "her",
)
SEQ_LENGTH = 256


def write_records(folder: Path, count: int, seed: int = 0) -> Path:
    """Records of judgements by a prompt file beside them; each text has its word six times among six others."""
    rng = random.Random(seed)
    prompt = folder / "colour.txt"
    prompt.write_text(PROMPT)
    records = []
    for _ in range(count):
        verdict = rng.choice("AB")
        words = [WORDS[verdict]] * 6 + rng.choices(FILLING, k=6)
        rng.shuffle(words)
        records.append({"criterion": str(prompt), "verdict": verdict, "prefix": "", "candidate": " ".join(words)})
    path = folder / "colours.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def save_undecided_policy(folder: Path, model: Any, tokenizer: Any, records: Path) -> float:
    """`model` with a head that answers with either label, as likely, whatever the text: where its learning is to begin.

    Returns its reward: the mean probability of the right label.
    """
    import torch

    settings = LabelledSettings("judgements", max_prompt=SEQ_LENGTH - 1, max_answer=1)
    writer = make_writer(settings, tokenizer)
    tasks = LabelledSource(open_records((str(records),), "100,0,0", writer), "train", writer, seed=1).tasks(0, 32)
    _, labels = ChatEncoder(tokenizer).choices("COLOUR: ", tuple(WORDS))
    right = [labels[list(WORDS).index(task.suffix_text)] for task in tasks]
    with torch.no_grad():
        last = torch.stack([model.model(torch.tensor([task.prefix_ids])).last_hidden_state[0, -1] for task in tasks])
        mean = last.mean(0)
        model.lm_head.weight[labels] = 16 * mean / mean.norm() ** 2
        reward = float(model.lm_head(last).softmax(-1)[range(len(tasks)), right].mean())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return reward
