"""Which files the entries of `--data-path` (and of a tool's `--input`) name.

A file's format and name are those that the user gave it: downloads are often links to files without a suffix (the hub's
cache, DVC, git-annex). Which file it is, is what the links lead to.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_sip.data.text_sources import SUPPORTED, is_text_source
from megatron_sip.data.token_store import bin_path, idx_path
from megatron_sip.errors import DataError

log = logging.getLogger(__name__)

_READABLE = f"readable are {SUPPORTED} and .bin/.idx pairs"
_STORE_SUFFIXES = (".bin", ".idx")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Files drawn from as one source. `weight` is its share of tasks, None where the user gave no weights.

    A path is a text file, or the prefix of a token store, under the name that the user gave it; no file is there twice.
    """

    paths: tuple[Path, ...]
    weight: Fraction | None
    name: str


def parse_data_path(data_path: Sequence[str], flag: str = "--data-path") -> list[SourceSpec]:
    """Sources from `[weight] path` entries: text files, .bin/.idx prefixes or globs (`**` too).

    Without weights all files are one source, so that every document is as likely. Raises `DataError` for a missing
    file, an empty glob, an unknown format, a weight without a path, weights on some entries only, a repeated file.
    `flag` is the one to name in messages.
    """
    if not data_path:
        raise DataError(f"{flag} is empty; name text files ({SUPPORTED}), .bin/.idx prefixes or globs")
    try:
        return _parse(data_path, flag)
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that may not be read, ~nobody
        raise DataError(f"{flag}: {error}") from error


def _parse(data_path: Sequence[str], flag: str) -> list[SourceSpec]:
    specs: list[SourceSpec] = []
    weight: Fraction | None = None
    for entry in data_path:
        number = _weight(entry, flag)
        if number is None:
            specs.append(SourceSpec(_expand(entry, flag), weight, entry))
        elif weight is not None:
            raise DataError(f"{flag}: {entry!r} follows a weight; a path must come between two weights")
        weight = number
    if weight is not None:
        raise DataError(f"{flag} ends with the weight {data_path[-1]!r}; a weight stands before its path")
    bare = [spec.name for spec in specs if spec.weight is None]
    if 0 < len(bare) < len(specs):
        raise DataError(f"{flag}: {bare[0]!r} has no weight, others do; give every entry one (and quote globs) or none")
    if bare:
        paths = _without_repeats({path for spec in specs for path in spec.paths}, flag)
        return [SourceSpec(paths, None, ", ".join(bare) if len(bare) < 4 else f"{len(bare)} files from {bare[0]}")]
    _refuse_repeats(specs, flag)
    return specs


def _weight(entry: str, flag: str) -> Fraction | None:
    if Path(entry).exists():
        return None
    try:
        weight = Fraction(entry)
    except (ValueError, ZeroDivisionError):
        return None
    if weight <= 0:
        raise DataError(f"{flag}: the weight {entry!r} must be positive")
    return weight


def _expand(entry: str, flag: str) -> tuple[Path, ...]:
    path = Path(entry).expanduser()
    if _is_source(path):
        return (_named(path),)
    if any(character in entry for character in "*?["):
        return _glob(entry, path, flag)
    _refuse_dangling(path, flag)
    if (path / "manifest.json").is_file():
        raise DataError(
            f"{flag}: {entry!r} is a corpus; name its files, '{path}/documents/*.jsonl.zst', or with --subset, where it has "
            "roles, one of them"
        )
    if path.is_dir():
        raise DataError(f"{flag}: {entry!r} is a folder; name its files, e.g. '{path}/*.jsonl'")
    if path.exists():
        raise DataError(f"{flag}: {entry!r} has an unknown format; {_READABLE}")
    raise DataError(f"{flag}: no such file: {entry!r} (nor {bin_path(path).name!r} with its .idx)")


def _glob(entry: str, path: Path, flag: str) -> tuple[Path, ...]:
    found: set[Path] = set()
    others: list[Path] = []
    for match in sorted(map(Path, glob.glob(str(path), recursive=True))):  # noqa: PTH207  # Path.glob wants a relative pattern
        if _is_source(match):
            found.add(_named(match))
            continue
        if is_text_source(match) or match.suffix in _STORE_SUFFIXES:
            _refuse_dangling(match, flag)
        if not match.is_dir():
            others.append(match)
    if not found:
        raise DataError(f"{flag}: no file matches {entry!r}; {_READABLE}")
    if others:
        log.warning(
            "%s: %r also matches %d files that are left out, e.g. %s; %s",
            flag,
            entry,
            len(others),
            others[0],
            _READABLE,
        )
    return _without_repeats(found, flag)


def _is_source(path: Path) -> bool:
    if not path.name:  # the root
        return False
    prefix = _named(path)
    return (path.is_file() and is_text_source(path)) or (bin_path(prefix).is_file() and idx_path(prefix).is_file())


def _named(path: Path) -> Path:
    """The absolute path as given, whose parts tell format, name and what lies beside it; of a pair, the prefix."""
    path = path.absolute()
    return path.with_suffix("") if path.suffix in _STORE_SUFFIXES else path


def _file(path: Path) -> Path:
    """The file behind a path of a `SourceSpec`, of a pair the .bin's: equal for two names of one file."""
    return (path if is_text_source(path) else bin_path(path)).resolve()


def _refuse_dangling(path: Path, flag: str) -> None:
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{flag}: {path} is a link to {path.readlink()}, which is not there: fetch it first (git annex get, dvc pull, or "
            "download it again into the hub's cache)"
        )


def _without_repeats(paths: Iterable[Path], flag: str) -> tuple[Path, ...]:
    """Sorted, with one name for each file; says which others were left out."""
    kept: dict[Path, Path] = {}
    for path in sorted(paths):
        first = kept.setdefault(_file(path), path)
        if first != path:
            log.warning("%s: %s is the same file as %s: read once", flag, path, first)
    return tuple(kept.values())


def _refuse_repeats(specs: Sequence[SourceSpec], flag: str) -> None:
    seen: dict[Path, str] = {}
    for spec in specs:
        for path in spec.paths:
            file = _file(path)
            if file in seen:
                raise DataError(
                    f"{flag}: {path} is in both {seen[file]!r} and {spec.name!r}; the two would not "
                    "agree on which of its documents are held out: name it once"
                )
            seen[file] = spec.name
