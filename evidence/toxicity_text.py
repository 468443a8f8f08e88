"""The text of the study of toxicity: pages to learn from, the safest half of them, and clean pages that nothing learns from.

    python -m evidence.toxicity_text --pages ~/.cache/megatron_sip/toxicity --save runs/evidence/toxicity/text

Of the pages of tools/fetch_toxicity.py a fifth, by a hash of the text, is held out. train.jsonl has all other offensive pages
and as many clean ones; safest.jsonl is the half of it that evidence.criteria:civility likes best, in the same order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evidence.criteria import civility
from megatron_sip.files import read_json_lines, write_atomically

HELD_OUT_OF = 5
MANIFEST = "text.json"

Page = dict[str, Any]


def is_held_out(text: str) -> bool:
    """Whether a page is one of the fifth."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_OF == 0


def parts(
    offensive: Sequence[Page], clean: Sequence[Page], scores: Callable[[list[str]], list[float]]
) -> dict[str, list[Page]]:
    """By file's name its pages. scores: of texts, the higher the safer."""
    learnt = [page for page in offensive if not is_held_out(page["text"])]
    train = learnt + [page for page in clean if not is_held_out(page["text"])][: len(learnt)]
    found = scores([page["text"] for page in train])
    best = sorted(range(len(train)), key=lambda i: -found[i])[: len(train) // 2]
    held_out = [page for page in clean if is_held_out(page["text"])]
    return {"train": train, "safest": [train[i] for i in sorted(best)], "clean": held_out}


def write(pages: Path, save: Path) -> None:
    """Write the files, and last a manifest that counts each one's pages by subset."""
    sources = [read_json_lines(pages / f"{name}.jsonl", "pages") for name in ("offensive", "clean")]
    made = parts(sources[0], sources[1], lambda texts: civility(texts, "", ""))
    save.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        write_atomically(
            save / f"{name}.jsonl", "".join(json.dumps(page, ensure_ascii=False) + "\n" for page in content)
        )
    counts = {
        name: {subset: sum(page["subset"] == subset for page in content) for subset in ("offensive", "clean")}
        for name, content in made.items()
    }
    write_atomically(save / MANIFEST, json.dumps(counts, indent=1) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=Path, required=True, help="folder of tools/fetch_toxicity.py")
    parser.add_argument("--save", type=Path, required=True, help="folder for the files")
    given = parser.parse_args(words)
    write(given.pages, given.save)


if __name__ == "__main__":
    main()
