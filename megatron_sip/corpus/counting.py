"""What the shards of a corpus come to: sums over their marks, as the manifest says them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_sip.corpus.folder import CorpusFolder
from megatron_sip.data.corpus_files import CorpusFile

KEPT_BY = ("by_subset", "by_role")


def mark_of(
    folder: CorpusFolder, inputs: Iterable[Path], outputs: Iterable[Path], counts: Mapping[str, int]
) -> dict[str, Any]:
    """What is said of a shard that is done: of which files it was made, which of the folder's it became, and its counts by
    `documents/...`, `by_subset/...`, `dropped/...`."""
    read = [{"path": str(path), **_content(path)} for path in inputs]
    made = {str(path.relative_to(folder.path)): _content(path) for path in outputs}
    return {"inputs": read, "outputs": made, "counts": dict(counts)}


def _content(path: Path) -> dict[str, Any]:
    found = CorpusFile.of(path)
    return {"bytes": found.bytes, "sha256": found.sha256}


def summed(folder: CorpusFolder, names: Iterable[str]) -> tuple[dict[str, Any], Counter[str]]:
    """Of the shards, which are all done: their files, what was read and kept, what was dropped by reason; and all counts."""
    marks = {name: folder.mark(name) or {} for name in names}
    counts: Counter[str] = Counter()
    for mark in marks.values():
        counts.update(mark["counts"])

    def under(prefix: str) -> dict[str, int]:
        return {name.removeprefix(prefix): count for name, count in counts.items() if name.startswith(prefix)}

    kept_by = {name: found for name in KEPT_BY if (found := under(f"{name}/"))}
    return {
        "shards": [
            {"name": name, "inputs": mark["inputs"], "outputs": mark["outputs"]} for name, mark in marks.items()
        ],
        "documents": {**under("documents/"), **kept_by},
        "dropped": under("dropped/"),
    }, counts
