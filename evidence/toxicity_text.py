"""The text of the study of toxicity: pages to learn from, the safest of their suffixes, clean pages that nothing learns from.

    python -m evidence.toxicity_text --pages ~/.cache/megatron_sip/toxicity --tokenizer HF_DIR --pieces 256 \
        --save runs/evidence/toxicity/text

Of the pages of tools/fetch_toxicity.py a fifth, by a hash of the text, is held out. train.jsonl has all other offensive pages
and as many clean ones. safest.bin/.idx has the `--pieces` safest, by evidence.criteria:civility of their suffixes, of twice as
many pieces of those pages, each as its own document: where a prefix has PREFIX tokens at least, its suffix is the judged one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evidence.criteria import civility
from megatron_sip.data.documents import open_splits
from megatron_sip.data.tasks import TaskSettings, TaskSource
from megatron_sip.data.token_store import TokenStoreWriter, token_dtype
from megatron_sip.data.tokenization import TokenizeSettings
from megatron_sip.evaluation.served_model import load_tokenizer
from megatron_sip.files import read_json_lines, write_atomically

HELD_OUT_OF = 5
MANIFEST = "text.json"
PREFIX, SUFFIX = 44, 20
"""Tokens of a piece's prefix and suffix."""
SEED = 1234

Page = dict[str, Any]
Scores = Callable[[list[str]], list[float]]
"""Of texts, the higher the safer."""


def is_held_out(text: str) -> bool:
    """Whether a page is one of the fifth."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_OF == 0


def parts(offensive: Sequence[Page], clean: Sequence[Page]) -> dict[str, list[Page]]:
    """By file's name its pages."""
    learnt = [page for page in offensive if not is_held_out(page["text"])]
    train = learnt + [page for page in clean if not is_held_out(page["text"])][: len(learnt)]
    return {"train": train, "clean": [page for page in clean if is_held_out(page["text"])]}


def write_safest(pages: Path, prefix: Path, tokenizer: Any, pieces: int, scores: Scores) -> Counter[str]:
    """Write the safest of twice as many pieces of a file of pages; how many of the written ones are of pages of each subset.

    Raises DataError for pages of which none is long enough.
    """
    corpus = open_splits(["train"], [str(pages)], "1,0,0", None, tokenizer, TokenizeSettings())["train"]
    source = TaskSource(corpus, tokenizer, TaskSettings(PREFIX + SUFFIX, SUFFIX, "random", SEED, PREFIX))
    tasks = source.tasks(0, 2 * pieces)
    found = scores([task.suffix_text for task in tasks])
    best = sorted(sorted(range(len(tasks)), key=lambda i: -found[i])[:pieces])
    with TokenStoreWriter(prefix, token_dtype(corpus.vocab_size)) as store:
        for i in best:
            ids = np.array([*tasks[i].prefix_ids, *tasks[i].suffix_ids])
            store.add(ids, np.array([len(ids)], np.int32))
    subsets = [page["subset"] for page in read_json_lines(pages, "pages")]
    return Counter(subsets[source.document(tasks[i].index)[1]] for i in best)


def write(pages: Path, save: Path, tokenizer: Any, pieces: int) -> None:
    """Write the files, and last a manifest that counts each one's pages, or pieces, by subset."""
    sources = [read_json_lines(pages / f"{name}.jsonl", "pages") for name in ("offensive", "clean")]
    made = parts(*sources)
    save.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        write_atomically(
            save / f"{name}.jsonl", "".join(json.dumps(page, ensure_ascii=False) + "\n" for page in content)
        )
    counts = {name: Counter(page["subset"] for page in content) for name, content in made.items()}
    safest = write_safest(
        save / "train.jsonl", save / "safest", tokenizer, pieces, lambda texts: civility(texts, "", "")
    )
    counts["safest"] = safest
    subsets = ("offensive", "clean")
    manifest = {name: {subset: count[subset] for subset in subsets} for name, count in counts.items()}
    write_atomically(save / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, required=True, help="folder of tools/fetch_toxicity.py")
    parser.add_argument("--tokenizer", required=True, help="HF folder of the policy's tokenizer")
    parser.add_argument("--pieces", type=int, required=True, help="of the safest, as many as an arm learns from")
    parser.add_argument("--save", type=Path, required=True, help="folder for the files")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    given = command_line().parse_args(words)
    write(given.pages, given.save, load_tokenizer(given.tokenizer), given.pieces)


if __name__ == "__main__":
    main()
