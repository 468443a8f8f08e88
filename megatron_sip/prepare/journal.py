"""What was made so far and where reading goes on, such that a kill at any moment leaves the two in agreement.

.made.jsonl     records, in the order of their documents; what stands behind the bytes that progress.json knows of is cut off
progress.json   written atomically after each unit of documents: place, bytes of .made.jsonl, counts, and what the work is
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import filelock
import orjson

from megatron_sip.errors import DataError
from megatron_sip.files import read_json, write_atomically
from megatron_sip.judge.probe import model_name
from megatron_sip.judge.settings import DEFAULT_MODEL
from megatron_sip.prepare.documents import Place
from megatron_sip.prepare.settings import PrepareError

MANIFEST = "manifest.json"
WRITTEN_LAST = ("formats", "balance", "rewrite_prompt")
"""Of the identity, what only decides how the records are written that were made: as long as none are, it may change."""


class Journal:
    """The work in a folder. `identity` is what it is: another one's is refused."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = orjson.loads(orjson.dumps(identity))
        self.counts: Counter[str] = Counter()
        self.position: Place = (0, 0)
        self.teacher: str | None = None
        self._bytes = 0
        self._records = folder / ".made.jsonl"
        self._progress = folder / "progress.json"

    @classmethod
    @contextmanager
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> Iterator[Self]:
        """The journal of `folder`, as a process that was killed there left it; no other process may hold it.

        Raises PrepareError for a folder that another process works in, or that holds other work.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(folder / ".lock", timeout=0):
                journal = cls(folder, identity)
                journal._resume()
                yield journal
        except filelock.Timeout:
            raise PrepareError(f"--out {folder}: another process prepares records there; wait for it") from None

    @property
    def finished(self) -> bool:
        """Whether the manifest is there, which is written last."""
        return (self.folder / MANIFEST).exists()

    def _resume(self) -> None:
        if self.finished:
            self._check(self.manifest(), self.folder / MANIFEST)
            self._clean()
        elif self._progress.exists():
            state = read_json(self._progress, "the progress of a preparation")
            self._check(state, self._progress, besides=WRITTEN_LAST)
            self.counts = Counter(state["counts"])
            self.position = (state["position"][0], state["position"][1])
            self.teacher = state.get("teacher")
            self._bytes = state["bytes"]
            if not self._records.exists() or self._records.stat().st_size < self._bytes:
                raise DataError(f"{self._records} is shorter than {self._progress} says: begin anew in an empty folder")
            os.truncate(self._records, self._bytes)
        else:
            self._records.unlink(missing_ok=True)
            if others := sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(".")):
                raise PrepareError(f"--out {self.folder} already holds {', '.join(others[:3])}: name a new folder")

    def _clean(self) -> None:
        """Remove what only this work needed."""
        for path in (self._records, self._progress):
            path.unlink(missing_ok=True)

    def _check(self, state: Mapping[str, Any], path: Path, besides: Sequence[str] = ()) -> None:
        known = state.get("identity", {})
        names = {*known, *self.identity}.difference(besides)
        other = sorted(name for name in names if known.get(name) != self.identity.get(name))
        if other:
            raise PrepareError(
                f"{path} is of other work, which differs in {', '.join(other)}: give the same flags and files to go on with "
                "it, or name another --out"
            )

    def made_by(self, teacher: str | None) -> None:
        """Note the model that answers, by its name, or its folder, which may lie elsewhere after a restart.

        Raises PrepareError where another one made the records so far.
        """
        known, name = (None if each in (None, DEFAULT_MODEL) else model_name(each) for each in (self.teacher, teacher))
        if known is not None and name != known:
            raise PrepareError(
                f"--out {self.folder}: its records so far were made by {self.teacher}, and {teacher} would go on: serve the "
                "one that began, or name another --out"
            )
        self.teacher = teacher

    def commit(self, records: Sequence[Mapping[str, Any]], position: Place, counts: Mapping[str, int]) -> None:
        """Keep the records of a unit of documents; all before `position` is then never read again."""
        content = b"".join(orjson.dumps(record) + b"\n" for record in records)
        with self._records.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._bytes += len(content)
        self.position, self.counts = position, Counter(counts)
        state = {"identity": self.identity, "position": position, "bytes": self._bytes, "counts": dict(counts)}
        state |= {"teacher": self.teacher}
        write_atomically(self._progress, orjson.dumps(state, option=orjson.OPT_INDENT_2))

    def manifest(self) -> dict[str, Any]:
        """Of finished work."""
        return read_json(self.folder / MANIFEST, "a manifest of prepared records")

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, in order."""
        if self._records.exists():
            with self._records.open("rb") as file:
                for line in file:
                    yield orjson.loads(line)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, the last of all files, and remove what only the work needed."""
        told = {} if self.teacher is None else {"teacher": self.teacher}
        content = orjson.dumps({**manifest, **told, "identity": self.identity}, option=orjson.OPT_INDENT_2)
        write_atomically(self.folder / MANIFEST, content + b"\n")
        self._clean()
