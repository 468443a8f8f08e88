"""Write the demo's corpus: the 79 topics of Python's own reference (`help("topics")`, 490 kB) as JSON lines.

    python tools/write_demo_corpus.py --save ~/.cache/megatron_sip/python_topics.jsonl

Real prose that every Python carries, so the demo needs no download.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

DEFAULT_SAVE = Path.home() / ".cache" / "megatron_sip" / "python_topics.jsonl"


def write_corpus(save: Path) -> Path:
    """Write one {"name", "text"} object a topic to `save` (replaced only when complete or different); return `save`."""
    content = "".join(json.dumps({"name": name, "text": topics[name]}) + "\n" for name in sorted(topics))
    save = save.expanduser()
    if save.is_file() and save.read_text(encoding="utf-8") == content:
        return save  # keeps the modification time, and with it the tokenised cache
    save.parent.mkdir(parents=True, exist_ok=True)
    staged = save.with_name(save.name + ".partial")
    staged.write_text(content, encoding="utf-8")
    staged.replace(save)
    return save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=DEFAULT_SAVE, help="the file to write")
    print(write_corpus(parser.parse_args().save))


if __name__ == "__main__":
    main()
