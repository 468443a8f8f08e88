"""Small tasks of lm-eval in files of a test's own: a choice with few-shot examples, a text to write, a text to score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHOICE, WRITTEN, SCORED = "sip_colours", "sip_written", "sip_scored"
COLOURS = ("red", "dark green", "blue")


def write_tasks(folder: Path, questions: int = 12) -> Path:
    """Task files and their data in `folder`, which is made."""
    folder.mkdir()
    things = [f"thing number {number} of {number * 7 % 11} in the long, quiet hall" for number in range(questions + 3)]
    records = [{"thing": thing, "colours": COLOURS, "answer": place % 3} for place, thing in enumerate(things)]
    splits = {"dev": records[:3], "test": records[3:]}
    for split, lines in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"data_files": {split: str(folder / f"{split}.jsonl") for split in splits}}
    common: dict[str, Any] = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    text = "Q: What colour is {{thing}}?\nA:"
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    few = {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    choice = {"doc_to_choice": "colours", "doc_to_target": "answer", "metric_list": [accuracy]}
    written = {"doc_to_target": "{{colours[answer]}}", "metric_list": [exact]}
    how = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}
    perplexity = {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
    rolling = {"doc_to_target": "{{thing}}", "doc_to_text": "", "metric_list": [perplexity]}
    tasks: dict[str, dict[str, Any]] = {
        CHOICE: {"output_type": "multiple_choice", "doc_to_text": text, **few, **choice},
        WRITTEN: {"output_type": "generate_until", "doc_to_text": text, **few, **written, **how},
        SCORED: {"output_type": "loglikelihood_rolling", **few, **rolling},
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}, indent=2))
    return folder
