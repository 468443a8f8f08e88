"""Wikipedia leads behind those that examples/train_judge.sh takes: for all that must not have been seen by its judge.

python -m evidence.later_leads LEADS.jsonl FILE.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_sip.files import write_atomically

TAKEN = 4000
"""The script reads 3,200 documents."""


def later(content: bytes) -> bytes:
    """The lines behind the first TAKEN."""
    return b"".join(content.splitlines(keepends=True)[TAKEN:])


def main() -> None:
    leads, file = map(Path, sys.argv[1:])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, later(leads.read_bytes()))


if __name__ == "__main__":
    main()
