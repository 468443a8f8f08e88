"""Write the demo's corpus: Python's own reference (`help("topics")`, about 50 documents, 390 kB) as JSON lines.

    python tools/write_demo_corpus.py --save ~/.cache/megatron_sip/python_topics.jsonl

Real prose that every Python carries, so the demo needs no download. A third of the topics repeat sections of longer ones
("while" is a part of "compound"); they are left out, or else held-out documents would have been seen in training.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

from megatron_sip.files import write_atomically

DEFAULT_SAVE = Path.home() / ".cache" / "megatron_sip" / "python_topics.jsonl"
_LONG_LINE = 30  # characters; shorter lines recur by chance
_MAX_REPEATED = 0.1


def distinct_documents(documents: Mapping[str, str]) -> dict[str, str]:
    """The documents, longest first, of whose long lines at most a tenth stands in longer ones."""
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(documents, key=lambda name: (-len(documents[name]), name)):
        lines = {line.strip() for line in documents[name].splitlines() if len(line.strip()) > _LONG_LINE}
        if len(lines & seen) <= _MAX_REPEATED * len(lines):
            kept[name] = documents[name]
            seen |= lines
    return kept


def write_corpus(save: Path) -> Path:
    """Write one {"name", "text"} object a document to `save`, unless it is there already; return `save`."""
    content = "".join(
        json.dumps({"name": name, "text": text}) + "\n" for name, text in sorted(distinct_documents(topics).items())
    )
    save = save.expanduser()
    if save.is_file() and save.read_text(encoding="utf-8") == content:
        return save  # keeps the modification time, and with it the tokenised cache
    save.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(save, content)
    return save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=DEFAULT_SAVE, help="the file to write")
    print(write_corpus(parser.parse_args().save))


if __name__ == "__main__":
    main()
