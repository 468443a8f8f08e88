"""A folder that holds a corpus, the same for every command that writes one, and readable by `--data-path`:

OUT/documents/SHARD.jsonl.zst   a line a document: {"id", "text", "subset"}, in the order of the input
OUT/shards/SHARD.json           inputs with digests, counts by rule; written last, so that it says that the shard is done
OUT/manifest.json               all shards together; written when all are done
OUT/.work.json                  what the work is: other work is refused here

Nothing in them tells when or by how many processes they were written: the same work ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import filelock
import orjson
import zstandard

from megatron_sip.corpus.rules import Document
from megatron_sip.data.text_sources import numbered_lines
from megatron_sip.errors import UserError
from megatron_sip.files import described, move_into_place, read_json, write_atomically

MANIFEST = "manifest.json"
SUFFIX = ".jsonl.zst"
VERSIONED = ("megatron_sip", "orjson", "pyarrow", "zstandard")
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
                corpus._resume(orjson.loads(orjson.dumps(identity)))
                yield corpus
        except filelock.Timeout:
            raise CorpusError(f"--out {folder}: another process works there; wait for it") from None

    def _resume(self, identity: dict[str, Any]) -> None:
        place = self.path / ".work.json"
        if place.exists():
            known = read_json(place, "the description of a work")
            if other := sorted(name for name in {*known, *identity} if known.get(name) != identity.get(name)):
                raise CorpusError(
                    f"--out {self.path} holds other work, which differs in {', '.join(other)}: give the same flags and files "
                    "to go on with it, or name another folder"
                )
        elif others := sorted(path.name for path in self.path.iterdir() if not path.name.startswith(".")):
            raise CorpusError(f"--out {self.path} already holds {', '.join(others[:3])}: name a new folder")
        write_atomically(place, _json(identity))  # first: what is in the folder is then known to be of this work
        for name in ("documents", "shards"):
            (self.path / name).mkdir(exist_ok=True)
        self._clean()

    def _clean(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self.path.rglob(".*.partial"):
            path.unlink(missing_ok=True)

    def documents(self, shard: str, part: str = "") -> Path:
        """The file of a shard's documents, or of a part of them that has a folder of its own."""
        return self.path / "documents" / part / f"{shard}{SUFFIX}"

    def mark_path(self, shard: str) -> Path:
        """The file that says that a shard is done."""
        return self.path / "shards" / f"{shard}.json"

    def mark(self, shard: str) -> dict[str, Any] | None:
        """What was said of a shard that is done, None before."""
        path = self.mark_path(shard)
        return read_json(path, "what was counted of a shard") if path.exists() else None

    def mark_done(self, shard: str, mark: Mapping[str, Any]) -> None:
        """Say that a shard's documents are all there."""
        write_atomically(self.mark_path(shard), _json(mark))

    def finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest, with the versions of what made the corpus, the last of all files. Returns it as read back."""
        self._clean()
        versions = {name: version(name) for name in VERSIONED}
        write_atomically(self.path / MANIFEST, _json({**manifest, "versions": versions}))
        return self.manifest()

    def manifest(self) -> dict[str, Any]:
        """Of finished work. Raises DataError."""
        return read_json(self.path / MANIFEST, "the manifest of a corpus")


def shards_of(folder: Path) -> list[Path]:
    """The files of documents of a corpus that is finished, in order. Raises CorpusError for one that is not."""
    if not (folder / MANIFEST).exists():
        raise CorpusError(
            f"{folder} has no {MANIFEST}: name a folder that a command of megatron-sip-prepare has finished"
        )
    return sorted((folder / "documents").glob(f"*{SUFFIX}"))


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
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with staged.open("wb") as raw, zstandard.ZstdCompressor(LEVEL).stream_writer(raw, closefd=False) as packed:

            def write(document: Document) -> None:
                record = {"id": document.id, "text": document.text, "subset": document.subset}
                packed.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

            yield write
        move_into_place(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
