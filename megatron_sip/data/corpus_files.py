"""The files of a finished corpus, by its manifest: none is missing, none is there that it does not name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_sip.errors import DataError
from megatron_sip.files import described

MANIFEST, DOCUMENTS = "manifest.json", "documents"
MEND = "make the corpus anew, or fetch it anew"


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of documents as its maker left it."""

    path: Path
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """As it is now."""
        return cls(path, path.stat().st_size, digest(path))

    @property
    def is_there(self) -> bool:
        """Whether a file of its name and size is."""
        return self.path.is_file() and self.path.stat().st_size == self.bytes

    def check(self) -> None:
        """Raises DataError where its content is another: it is read whole."""
        if digest(self.path) != self.sha256:
            raise DataError(f"{self.path} is not what its corpus's manifest says (another SHA-256): {MEND}")


def outputs_of(folder: Path, shard: Mapping[str, Any]) -> list[CorpusFile]:
    """The files that a shard of `folder` became, as its mark and the manifest tell of it."""
    return [CorpusFile(folder / name, each["bytes"], each["sha256"]) for name, each in shard["outputs"].items()]


def listed_files(folder: Path, manifest: Mapping[str, Any], part: str = "") -> list[CorpusFile]:
    """The files of documents of a finished corpus, or those below documents/PART, in the order of shards.

    Raises DataError for one that is missing or has another size, and for one that the manifest does not name.
    """
    top = folder / DOCUMENTS / part
    with described(folder / MANIFEST, "the manifest of a corpus"):
        every = [each for shard in manifest["shards"] for each in outputs_of(folder, shard)]
    listed = [each for each in every if each.path.is_relative_to(top)]
    if lost := [each.path for each in listed if not each.is_there]:
        problem = "has another size than its corpus's manifest says" if lost[0].is_file() else "is missing"
        raise DataError(f"{lost[0]} {problem} (of {len(listed)} files {len(lost)}): {MEND}")
    known = {each.path for each in listed}
    found = (path for path in top.rglob("*") if path.is_file() and not path.name.startswith("."))
    if others := sorted(path for path in found if path not in known):
        raise DataError(f"{others[0]} is not of that corpus, whose manifest does not name it: take it out of {top}")
    return listed


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
