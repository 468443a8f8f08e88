"""A folder that holds a corpus, the same for every command that writes one, and readable by `--data-path`:

OUT/documents/SHARD.jsonl.zst   a line a document: {"id", "text", "subset"}, in the order of the input
OUT/shards/SHARD.json           inputs with digests, counts by rule; written last, so that it says that the shard is done
OUT/manifest.json               all shards together; written when all are done
OUT/.work.json                  what the work is: other work is refused here

Nothing in them tells when or by how many processes they were written: the same work ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import filelock
import orjson
import zstandard

from megatron_sip.corpus.rules import Document
from megatron_sip.data.corpus_files import DOCUMENTS, MANIFEST, CorpusFile, digest, listed_files, outputs_of
from megatron_sip.data.role_corpus import COMMAND as ROLES
from megatron_sip.data.text_sources import numbered_lines
from megatron_sip.errors import UserError
from megatron_sip.files import described, move_into_place, read_json, staged_beside, sweep_staged, write_atomically

WORK = ".work.json"
SUFFIX = ".jsonl.zst"
VERSIONED = ("megatron_sip", "datasketch", "numpy", "orjson", "pyarrow", "xxhash", "zstandard")
"""What the bytes depend on: part of what a work is."""
LEVEL = 3
"""Of zstd: its default, about 400 MB of text a second."""
DOCUMENTS_A_TICK = 256


class CorpusError(UserError, ValueError):
    """Flags or folders of the commands that make a corpus; the message names them and what would be right."""


class CorpusFolder:
    """The folder of a work, which `identity` tells from others, as a killed process left it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    @classmethod
    @contextmanager
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> Iterator[Self]:
        """Raises CorpusError for a folder that another process works in, or that holds other work."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(folder / ".lock", timeout=0):
                corpus = cls(folder)
                versions = {name: version(name) for name in VERSIONED}
                corpus._resume(orjson.loads(orjson.dumps({**identity, "versions": versions})))
                yield corpus
        except filelock.Timeout:
            raise CorpusError(f"--out {folder}: another process works there; wait for it") from None

    def _resume(self, identity: dict[str, Any]) -> None:
        place = self.path / WORK
        if place.exists():
            known = read_json(place, "the description of a work")
            if self.is_finished():  # by whatever versions: nothing is made any more
                identity["versions"] = known["versions"]
            if other := differences(known, identity):
                raise CorpusError(
                    f"--out {self.path} holds other work, which differs in {'; '.join(other)}: give the same flags and files "
                    "to go on with it, or name another folder"
                )
        elif others := sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")):
            raise CorpusError(f"--out {self.path} already holds {', '.join(others[:3])}: name a new folder")
        write_atomically(place, _json(identity))  # first: what is in the folder is then known to be of this work
        for name in ("documents", "shards"):
            (self.path / name).mkdir(exist_ok=True)
        sweep_staged(self.path)

    def documents(self, shard: str, part: str = "") -> Path:
        """The file of a shard's documents, or of a part of them that has a folder of its own."""
        return self.path / DOCUMENTS / part / f"{shard}{SUFFIX}"

    def mark_path(self, shard: str) -> Path:
        """The file that says that a shard is done."""
        return self.path / "shards" / f"{shard}.json"

    def mark(self, shard: str) -> dict[str, Any] | None:
        """What was said of a shard that is done; None before, and where what it became is gone or has another size."""
        path = self.mark_path(shard)
        if not path.exists():
            return None
        mark = read_json(path, "what was counted of a shard")
        with described(path, "what was counted of a shard"):
            return mark if all(each.is_there for each in outputs_of(self.path, mark)) else None

    def mark_done(self, shard: str, mark: Mapping[str, Any]) -> None:
        """Say that a shard's documents are all there."""
        write_atomically(self.mark_path(shard), _json(mark))

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, with the versions of what made the corpus, the last of all files. Returns it as read back."""
        sweep_staged(self.path, whole=True)
        known = read_json(self.path / WORK, "the description of a work")
        write_atomically(self.path / MANIFEST, _json({**manifest, "versions": known["versions"]}))
        return self.manifest()

    def is_finished(self) -> bool:
        """Whether the manifest is there, and every file that it names."""
        path = self.path / MANIFEST
        if not path.exists():
            return False
        with described(path, "the manifest of a corpus"):
            shards = self.manifest()["shards"]
            return all(each.is_there for shard in shards for each in outputs_of(self.path, shard))

    def manifest(self) -> dict[str, Any]:
        """Of finished work. Raises DataError."""
        return read_json(self.path / MANIFEST, "the manifest of a corpus")


def differences(known: Mapping[str, Any], given: Mapping[str, Any], under: str = "") -> list[str]:
    """Where two works differ: the names that lead there, joined by dots, and what is there and here."""
    found = []
    for name in sorted({*known, *given}):
        there, here = known.get(name), given.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += differences(there, here, f"{under}{name}.")
        elif isinstance(there, list) and isinstance(here, list) and there != here:
            first = next(one or other for one, other in zip_longest(here, there) if one != other)
            found.append(f"{under}{name} ({len(there)} there, {len(here)} here, the first other one {first!r})")
        elif there != here:
            found.append(f"{under}{name} ({there!r:.60} there, {here!r:.60} here)")
    return found


def shards_of(folder: Path) -> list[CorpusFile]:
    """The files of documents of a corpus that is finished, in order.

    Raises CorpusError for one that is not, or whose documents have roles; DataError where they are not as its manifest says.
    """
    if not (folder / MANIFEST).exists():
        raise CorpusError(
            f"{folder} has no {MANIFEST}: name a folder that a command of megatron-sip-prepare has finished"
        )
    manifest = CorpusFolder(folder).manifest()
    with described(folder / MANIFEST, "the manifest of a corpus"):
        command = manifest["command"]
    if command == ROLES:
        raise CorpusError(f"{folder}: its documents have roles already: name the corpus that it was made from")
    return listed_files(folder, manifest)


def made_of(folder: Path) -> dict[str, str]:
    """What a corpus is made of that is made of a finished one."""
    return {"path": str(folder.resolve()), "manifest_sha256": digest(folder / MANIFEST)}


def name_of(path: Path) -> str:
    """Of a shard, from its file of documents."""
    return path.name.removesuffix(SUFFIX)


def read_documents(path: Path, tick: Callable[[int, int], object] = lambda documents, size: None) -> Iterator[Document]:
    """The documents of a shard, in order; `tick` is told of how many more documents and bytes. Raises DataError."""
    documents = told = position = 0
    for number, line, position in numbered_lines(path):
        with described(f"{path}:{number}", "a document of a corpus"):
            record = orjson.loads(line)
            document = Document(record["id"], record["text"], record["subset"])
        yield document
        documents += 1
        if documents == DOCUMENTS_A_TICK:
            tick(documents, position - told)
            documents, told = 0, position
    tick(documents, path.stat().st_size - told)


@contextmanager
def writing_documents(path: Path) -> Iterator[Callable[[Document], None]]:
    """A function that adds a document to a shard, which gets its name when all are written; nothing is left of a failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = staged_beside(path)
    try:
        with staged.open("wb") as raw, zstandard.ZstdCompressor(LEVEL).stream_writer(raw, closefd=False) as packed:

            def write(document: Document) -> None:
                record = {"id": document.id, "text": document.text, "subset": document.subset}
                packed.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

            yield write
        move_into_place(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _json(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
