"""From documents to files of records: read, make, keep, write; whatever kills it, the same command goes on.

    manifest = await prepare(document_source(reading), output, "judgements", make, settings)

`make` gets a unit of documents (or of whatever the source reads) and says what became of each. Units are the same in every
run, and what is made of one depends on nothing else, so that the files are the same byte for byte however often the program
was killed (where a server answers, as far as its answers are in the cache or the same again).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_sip.console import bars
from megatron_sip.data.corpus_files import digest
from megatron_sip.judge.base import AsksTeacher
from megatron_sip.prepare.documents import Document, DocumentReader, Place
from megatron_sip.prepare.journal import Journal
from megatron_sip.prepare.output import write_records
from megatron_sip.prepare.settings import OutputSettings, PrepareError, ReadSettings

UNIT = 256
"""Documents that are worked on at once: what a kill costs at most."""
VERSIONED = ("megatron_sip", "transformers", "tokenizers", "pyarrow")


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a document: the records made of it, and what was dropped of it, by reason."""

    records: list[dict[str, Any]]
    dropped: Counter[str] = field(default_factory=Counter)


class Reader[T](Protocol):
    """Iterates over what is behind `position`, which moves on with it, as do `counts`."""

    position: Place
    counts: Counter[str]

    def __iter__(self) -> Iterator[T]: ...


@dataclass(frozen=True, slots=True)
class Source[T]:
    """Files, and how they are read from a place on. identity: what else decides what is read, as JSON. advice: what to
    do where nothing came of it."""

    files: tuple[Path, ...]
    identity: Mapping[str, Any]
    read: Callable[[Place, Counter[str], tqdm[Any]], Reader[T]]
    advice: str = "name other files, another --role, or other flags"


type Make[T] = Callable[[Sequence[T]], Awaitable[Sequence[Made]]]


def document_source(reading: ReadSettings) -> Source[Document]:
    """The documents of a role."""
    values = asdict(reading)
    paths = values.pop("paths")
    shares = {name: [str(part) for part in parts] for name, parts in values.pop("shares").items()}
    return Source(paths, {**values, "shares": shares}, lambda *place: DocumentReader(reading, *place))


async def prepare[T](
    source: Source[T],
    output: OutputSettings,
    task: str,
    make: Make[T],
    settings: Mapping[str, Any],
    teacher: AsksTeacher | None = None,
    enough: int | None = None,
) -> dict[str, Any]:
    """The manifest of the records in `output.folder`, which are made first as far as they are not there.

    task: judgements, rewrites, ...; names the files. settings: what else the records depend on. teacher: who is asked, checked
    before anything is made; finished work needs none. enough: stop when there are so many records.
    Raises PrepareError, DataError.
    """
    with Journal.open(output.folder, identity_of(source, output, task, settings)) as journal:
        if not journal.finished:
            if teacher is not None:
                await teacher.check()
                journal.made_by(teacher.model)
            await _make_all(source, journal, make, enough)
            kept = write_records(journal, output, task)
            journal.finish(_manifest(source, journal, kept))
        return journal.manifest()


async def _make_all[T](source: Source[T], journal: Journal, make: Make[T], enough: int | None) -> None:
    total = sum(path.stat().st_size for path in source.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="prepare", file=bars()) as bar:
        bar.update(sum(path.stat().st_size for path in source.files[: journal.position[0]]))
        reader = source.read(journal.position, Counter(journal.counts), bar)
        unit: list[T] = []

        async def keep() -> None:
            made = await make(unit) if unit else []
            for each in made:
                reader.counts.update({f"dropped/{reason}": count for reason, count in each.dropped.items()})
            records = [record for each in made for record in each.records]
            if enough is not None:
                room = enough - reader.counts["records/made"]
                reader.counts["dropped/beyond-enough"] += len(records[room:])
                records = records[:room]
            reader.counts["records/made"] += len(records)
            journal.commit(records, reader.position, reader.counts)
            bar.set_postfix(used=reader.counts["documents/used"], records=reader.counts["records/made"])
            unit.clear()

        for item in reader if reader.counts["records/made"] != enough else ():
            unit.append(item)
            if len(unit) == UNIT:
                await keep()
                if reader.counts["records/made"] == enough:
                    break
        await keep()


def identity_of[T](source: Source[T], output: OutputSettings, task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the records depend on, as JSON: a folder with another one's is not continued."""
    stats = [(path, path.stat()) for path in source.files]
    return {
        "task": task,
        "files": [{"path": str(path), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns} for path, stat in stats],
        "reading": dict(source.identity),
        "settings": dict(settings),
        "formats": list(output.formats),
        "balance": output.balance,
        "seed": output.seed,
        "rewrite_prompt": None if output.rewrite_prompt is None else output.rewrite_prompt.identity,
    }


def _manifest[T](source: Source[T], journal: Journal, kept: Mapping[str, Any]) -> dict[str, Any]:
    counts = journal.counts
    if not kept["total"]:
        dropped = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()) if count) or "no document"
        raise PrepareError(f"no record was made ({dropped}): {source.advice}")
    read = source.files[: journal.position[0] + 1]  # the others may be terabytes, of which nothing was needed
    bar = tqdm(read, desc="digests of the inputs", unit="file", file=bars(), disable=len(read) < 2)
    return {
        "inputs": [{"path": str(path), "sha256": digest(path)} for path in bar],
        "versions": {name: version(name) for name in VERSIONED},
        "documents": nested(counts, "documents"),
        "dropped": nested(counts, "dropped"),
        "records": {"made": counts["records/made"], **kept},
    }


def nested(counts: Mapping[str, int], name: str) -> dict[str, Any]:
    """The counts under `name/`, whose further slashes lead into objects; those that are 0 are left out."""
    found: dict[str, Any] = {}
    for key, count in sorted(counts.items()):
        top, *path, last = key.split("/")
        if top == name and count:
            place = found
            for part in path:
                place = place.setdefault(part, {})
            place[last] = count
    return found
