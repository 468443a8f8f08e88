"""From shards of a raw corpus to the documents that its rules keep: a process a shard, killed and restarted at will.

    manifest = make_corpus(CorpusWork(name="redpajama", shards=..., fields=..., rules=..., settings=...), out, workers=16)

What is made of a shard depends on nothing but the shard, the rules and the versions of the libraries, so that it does not
matter which process makes it, nor when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sip.corpus.counting import mark_of, summed
from megatron_sip.corpus.folder import CorpusError, CorpusFolder, writing_documents
from megatron_sip.corpus.rules import Document, Rule, first_reason
from megatron_sip.corpus.shards import Fields, RestOfShardError, Row, Shard, read_shard
from megatron_sip.corpus.workers import Tick, work_on
from megatron_sip.data.corpus_files import digest
from megatron_sip.errors import DataError
from megatron_sip.files import described

REPORTED = 200
"""Documents between two moves of the bar."""
BROKEN_SHOWN = 10
"""Messages of a shard that the manifest quotes."""


@dataclass(frozen=True, slots=True)
class CorpusWork:
    """name: the command's. settings: what the rules were made from, as JSON. drop_broken: count what cannot be read of a
    shard, and go on, where it is otherwise an error."""

    name: str
    shards: tuple[Shard, ...]
    fields: Fields
    rules: tuple[Rule, ...]
    settings: Mapping[str, Any]
    drop_broken: bool = False

    def identity(self) -> dict[str, Any]:
        """What the corpus depends on, as JSON."""
        return {
            "command": self.name,
            "files": [str(path) for shard in self.shards for path in shard.inputs],
            "settings": dict(self.settings),
        }


def make_corpus(work: CorpusWork, out: Path, workers: int) -> dict[str, Any]:
    """The manifest of the corpus in `out`, whose shards are made first as far as they are not there.

    Raises CorpusError, DataError (naming file and row), OSError where a disk is full.
    """
    with CorpusFolder.open(out, work.identity()) as folder:
        missing = [shard for shard in work.shards if not _is_done(folder, shard)]
        if not missing and folder.is_finished():
            return folder.manifest()
        total = sum(shard.path.stat().st_size for shard in missing)
        work_on(missing, partial(make_shard, work, folder), workers, total, work.name)
        return folder.finish(_manifest(work, folder))


def _is_done(folder: CorpusFolder, shard: Shard) -> bool:
    """Raises CorpusError where a file's content has changed since; one of a shard that is still to be made may be mended."""
    if (mark := folder.mark(shard.name)) is None:
        return False
    place = folder.mark_path(shard.name)
    for path, known in zip(shard.inputs, mark["inputs"], strict=True):
        now, then = path.stat(), place.stat().st_mtime_ns
        if now.st_size != known["bytes"] or (now.st_mtime_ns > then and digest(path) != known["sha256"]):
            raise CorpusError(f"{path} has changed since its shard was made: remove {place} to make it anew")
    return True


def make_shard(work: CorpusWork, folder: CorpusFolder, shard: Shard, tick: Tick) -> None:
    """Write a shard's documents, and then its mark. Raises DataError for what cannot be read, unless it is to be counted."""
    counts: Counter[str] = Counter()
    broken: list[str] = []

    def count_broken(what: str, error: DataError) -> None:
        if not work.drop_broken:
            raise error
        counts[what] += 1
        if len(broken) < BROKEN_SHOWN:
            broken.append(str(error))

    with writing_documents(folder.documents(shard.name)) as write:
        try:
            for row in _told(read_shard(shard, work.fields), shard, tick):
                counts["documents/read"] += 1
                try:
                    document, reason = _sorted(row, work.rules, shard)
                except RestOfShardError as error:
                    counts["dropped/rest_of_broken_shard"] += 1
                    if counts["dropped/rest_of_broken_shard"] == 1:
                        count_broken("broken_shards", error)
                    continue
                except DataError as error:
                    count_broken("dropped/broken_row", error)
                    continue
                if reason is not None:
                    counts[f"dropped/{reason}"] += 1
                    continue
                counts["documents/kept"] += 1
                counts[f"by_subset/{document.subset}"] += 1
                write(document)
        except DataError as error:
            count_broken("broken_shards", error)
    mark = mark_of(folder, shard.inputs, [folder.documents(shard.name)], counts)
    folder.mark_done(shard.name, {**mark, "broken": broken})


def _told(rows: Iterator[Row], shard: Shard, tick: Tick) -> Iterator[Row]:
    """The rows, while the bar is told of them."""
    told = count = 0
    for row in rows:
        count += 1
        if count == REPORTED:
            tick(count, row.position - told)
            told, count = row.position, 0
        yield row
    tick(count, shard.path.stat().st_size - told)


def _sorted(row: Row, rules: Sequence[Rule], shard: Shard) -> tuple[Document, str | None]:
    """A row's document, and why it goes. Raises DataError for what is none, and for signals that no rule understands."""
    if isinstance(row.found, DataError):
        raise row.found
    if not row.found.text.strip():
        return row.found, "empty"
    with described(f"{shard.path}: document {row.found.id}", "a document whose signals are [start, end, score] lists"):
        return row.found, first_reason(rules, row.found)


def _manifest(work: CorpusWork, folder: CorpusFolder) -> dict[str, Any]:
    names = [shard.name for shard in work.shards]
    found, counts = summed(folder, names)
    if not counts["documents/kept"]:
        raise CorpusError(
            f"--out {folder.path}: no document was kept of {counts['documents/read']}: {found['dropped']}"
        )
    return {
        "command": work.name,
        "settings": dict(work.settings),
        **found,
        "broken_shards": counts["broken_shards"],
        "broken": [message for name in names for message in (folder.mark(name) or {})["broken"]],
    }
