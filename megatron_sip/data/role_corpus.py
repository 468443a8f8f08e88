"""A corpus whose documents have roles, as `megatron-sip-prepare roles` leaves it and --data-path names it.

DIR/documents/ROLE/SPLIT/SHARD.jsonl.zst
DIR/manifest.json       the shares that the roles and splits were drawn by, and how many documents each has
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from megatron_sip.data.corpus_files import DOCUMENTS, MANIFEST, listed_files
from megatron_sip.data.roles import ROLES, SPLITS, DocumentRole, Shares, Split
from megatron_sip.errors import DataError
from megatron_sip.files import described, read_json

log = logging.getLogger(__name__)

COMMAND = "roles"
MADE_BY = "megatron-sip-prepare roles"
NO_CORPUS = "--data-path {entry}: {problem}: with {flag} name folders that {made_by} finished"


def role_paths(data_path: Sequence[str], role: DocumentRole, split: Split) -> list[str]:
    """Entries of --data-path, weights among them, with each folder replaced by a pattern of its files of the role and split.

    A folder without a held-out document is left out with its weight, and that is said, unless none has one.

    Raises DataError, which names the entry, for one that is no finished corpus with roles, has no document to train on, or
    other files than its manifest says.
    """
    entries: list[str] = []
    weight: list[str] = []
    without: list[str] = []
    for entry in data_path:
        if _is_weight(entry):
            weight.append(entry)
            continue
        folder = Path(entry).expanduser()
        counts = _manifest(folder, "--subset")[1]
        if counts.get(f"{role}/{split}"):
            listed_files(folder, read_json(folder / MANIFEST, "the manifest of a corpus"), f"{role}/{split}")
            entries += [*weight, str(Path(glob.escape(str(folder))) / DOCUMENTS / role / split / "*.jsonl.zst")]
        else:
            have = ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
            without.append(f"--data-path {entry}: no document for {role}/{split}; it has {have}")
        weight = []
    if without and (split == "train" or not entries):
        raise DataError(without[0])
    for problem in without:
        log.warning("%s: left out there", problem)
    return entries + weight


def shares_of(folder: Path, flag: str) -> Shares:
    """By which the corpus's roles and splits were drawn. Raises DataError for a folder that is none."""
    return _manifest(folder, flag)[0]


def files_of(folder: Path, role: DocumentRole, flag: str, splits: Sequence[Split] = SPLITS) -> tuple[Path, ...]:
    """A role's files, of these splits. Raises DataError where it has no document there."""
    counts = _manifest(folder, flag)[1]
    own = [split for split in splits if counts.get(f"{role}/{split}")]
    if not own:
        wanted = role if len(splits) > 1 else f"{role}/{splits[0]}"
        raise DataError(f"--data-path {folder}: no document for {wanted}; it has {', '.join(sorted(counts)) or 'none'}")
    manifest = read_json(folder / MANIFEST, "the manifest of a corpus")
    return tuple(each.path for split in own for each in listed_files(folder, manifest, f"{role}/{split}"))


def _manifest(folder: Path, flag: str) -> tuple[Shares, dict[str, int]]:
    path = folder / MANIFEST
    if not path.is_file():
        problem = f"no {MANIFEST} there" if folder.is_dir() else "no such folder"
        raise DataError(NO_CORPUS.format(entry=folder, problem=problem, flag=flag, made_by=MADE_BY))
    manifest = read_json(path, "the manifest of a corpus")
    with described(path, "the manifest of a corpus with roles"):
        if manifest["command"] != COMMAND:
            problem = f"its documents have no roles yet ({manifest['command']} made it)"
            raise DataError(NO_CORPUS.format(entry=folder, problem=problem, flag=flag, made_by=MADE_BY))
        given = manifest["settings"]
        shares = Shares(*(tuple(Fraction(given[name][one]) for one in names) for name, names in _SHARES.items()))
        return shares, dict(manifest["documents"]["by_role"])


_SHARES: dict[str, tuple[str, ...]] = {"role_shares": ROLES, "split": SPLITS}
"""Under which names of the manifest's settings a corpus's shares stand."""


def shares_json(shares: Shares) -> dict[str, dict[str, str]]:
    """As `shares_of` reads them back."""
    both = zip(_SHARES.items(), (shares.roles, shares.splits), strict=True)
    return {name: dict(zip(names, map(str, parts), strict=True)) for (name, names), parts in both}


def _is_weight(entry: str) -> bool:
    try:
        return not Path(entry).exists() and float(Fraction(entry)) > 0
    except (ValueError, ZeroDivisionError):
        return False
