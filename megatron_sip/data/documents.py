"""From what the user names (`--data-path 0.7 a/*.jsonl 0.3 b.parquet`) to indexed documents of tokens.

parse_data_path -> one SourceSpec a source -> open_corpus tokenises what is text -> Corpus -> split by document
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_sip.data.errors import DataError
from megatron_sip.data.ordering import Permutation
from megatron_sip.data.text_sources import SUPPORTED, is_text_source
from megatron_sip.data.token_store import TokenStore, bin_path, idx_path
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeReport, TokenizeSettings, cached_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "valid", "test")
_SPLIT_SEED = 20260121  # fixed: the held-out documents must not move when a run changes its seed
_OPEN_STORES = 128  # two file descriptors each


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """Files drawn from as one source. `weight` is its share of tasks, None where the user gave no weights.

    A path is a text file, or the prefix of a token store.
    """

    paths: tuple[Path, ...]
    weight: Fraction | None
    name: str


def parse_data_path(data_path: Sequence[str]) -> list[SourceSpec]:
    """Sources from `[weight] path` entries: text files, .bin/.idx prefixes or globs (`**` too).

    Without weights all files are one source, so that every document is as likely. Raises `DataError` for a missing
    file, an empty glob, an unknown format, a weight without a path, weights on some entries only, a repeated file.
    """
    if not data_path:
        raise DataError(f"--data-path is empty; name text files ({SUPPORTED}), .bin/.idx prefixes or globs")
    specs: list[SourceSpec] = []
    weight: Fraction | None = None
    for entry in data_path:
        number = _weight(entry)
        if number is None:
            specs.append(SourceSpec(_expand(entry), weight, entry))
        elif weight is not None:
            raise DataError(f"--data-path: {entry!r} follows a weight; a path must come between two weights")
        weight = number
    if weight is not None:
        raise DataError(f"--data-path ends with the weight {data_path[-1]!r}; a weight stands before its path")
    bare = [spec.name for spec in specs if spec.weight is None]
    if 0 < len(bare) < len(specs):
        raise DataError(
            f"--data-path: {bare[0]!r} has no weight, others do; give every entry one (and quote globs) or none"
        )
    if bare:
        paths = tuple(sorted({path for spec in specs for path in spec.paths}))
        return [SourceSpec(paths, None, ", ".join(bare) if len(bare) < 4 else f"{len(bare)} files from {bare[0]}")]
    _refuse_repeats(specs)
    return specs


def _weight(entry: str) -> Fraction | None:
    if Path(entry).exists():
        return None
    try:
        weight = Fraction(entry)
    except (ValueError, ZeroDivisionError):
        return None
    if weight <= 0:
        raise DataError(f"--data-path: the weight {entry!r} must be positive")
    return weight


def _expand(entry: str) -> tuple[Path, ...]:
    path = Path(entry).expanduser()
    if _is_source(path):
        return (_prefix_or_file(path),)
    if any(character in entry for character in "*?["):
        matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207  # Path.glob wants a relative pattern
        found = {_prefix_or_file(match) for match in matches if _is_source(match)}
        if not found:
            raise DataError(f"--data-path: no file matches {entry!r}; readable are {SUPPORTED} and .bin/.idx pairs")
        return tuple(sorted(found))
    if path.is_dir():
        raise DataError(f"--data-path: {entry!r} is a folder; name its files, e.g. '{path}/*.jsonl'")
    if path.exists():
        raise DataError(f"--data-path: {entry!r} has an unknown format; readable are {SUPPORTED} and .bin/.idx pairs")
    raise DataError(f"--data-path: no such file: {entry!r} (nor {bin_path(path).name!r} with its .idx)")


def _is_source(path: Path) -> bool:
    prefix = _prefix_or_file(path)
    return (path.is_file() and is_text_source(path)) or (bin_path(prefix).is_file() and idx_path(prefix).is_file())


def _prefix_or_file(path: Path) -> Path:
    return path.with_suffix("").resolve() if path.suffix in (".bin", ".idx") else path.resolve()


def _refuse_repeats(specs: Sequence[SourceSpec]) -> None:
    seen: dict[Path, str] = {}
    for spec in specs:
        for path in spec.paths:
            if path in seen:
                raise DataError(
                    f"--data-path: {path} is in both {seen[path]!r} and {spec.name!r}; the two would not "
                    "agree on which of its documents are held out: name it once"
                )
            seen[path] = spec.name


class DocumentSource:
    """The documents of several token stores, numbered through. Stores are opened when read, at most 128 at a time."""

    def __init__(self, name: str, prefixes: Sequence[Path], reports: Sequence[TokenizeReport]) -> None:
        self.name = name
        self.prefixes = tuple(prefixes)
        self.reports = tuple(reports)
        """One for each prefix that was made from text."""
        self._open = lru_cache(maxsize=_OPEN_STORES)(TokenStore)
        lengths = [self._open(prefix).lengths for prefix in self.prefixes]
        self.lengths: npt.NDArray[np.int64] = np.concatenate(lengths)
        """int64 [documents], tokens of each document."""
        self._ends = np.cumsum([len(part) for part in lengths])

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, document: int) -> tuple[Path, int]:
        """(prefix of the store, document number in it)."""
        store = int(np.searchsorted(self._ends, document, side="right"))
        return self.prefixes[store], document - (int(self._ends[store - 1]) if store else 0)

    def tokens(self, document: int) -> npt.NDArray[np.generic]:
        """The document's token ids: a view of the mapped file."""
        prefix, number = self.locate(document)
        return self._open(prefix)[number]


@dataclass(frozen=True)
class Corpus:
    """Sources with their weights (None for a single, unweighted one) and the share of documents that this split has.

    Documents are ranked by a fixed permutation of each source; a split is the ranks in [`begin`, `end`) of all.
    """

    sources: tuple[DocumentSource, ...]
    weights: tuple[Fraction, ...]
    vocab_size: int
    begin: Fraction = Fraction(0)
    end: Fraction = Fraction(1)
    split_name: str = "all"

    def documents(self, source: int) -> npt.NDArray[np.int64]:
        """int64, ascending: the numbers of the documents of `sources[source]` in this split."""
        count = len(self.sources[source])
        if not count:
            return np.zeros(0, np.int64)
        order = Permutation(count, _SPLIT_SEED).take(np.arange(count, dtype=np.int64))
        return np.flatnonzero((order >= round(count * self.begin)) & (order < round(count * self.end)))

    def split(self, split: str) -> dict[str, Corpus]:
        """{"train", "valid", "test"} by weights such as "969,30,1"; one or two numbers leave the later splits empty.

        Disjoint, together everything; the same whatever the run's seed and whatever the order files were named in.
        """
        edges = [Fraction(0)]
        for share in parse_split(split):
            edges.append(edges[-1] + share)
        return {
            name: replace(self, begin=begin, end=end, split_name=name)
            for name, begin, end in zip(SPLITS, edges[:-1], edges[1:], strict=True)
        }


def parse_split(split: str) -> tuple[Fraction, Fraction, Fraction]:
    """Shares of train, valid and test that sum to 1; `DataError` for anything but 1 to 3 non-negative numbers."""
    try:
        parts = [Fraction(part.strip()) for part in split.split(",")]
    except (ValueError, ZeroDivisionError):
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or sum(parts) <= 0:
        raise DataError(f"--split {split!r}: expected 1 to 3 non-negative numbers for train,valid,test like 969,30,1")
    parts += [Fraction(0)] * (3 - len(parts))
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total


def open_corpus(
    data_path: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings | None = None,
    vocab_size: int | None = None,
) -> Corpus:
    """Index every source of `data_path`: text is tokenised (once, see `tokenization`), token stores are checked.

    `vocab_size` is the model's: special tokens of the tokenizer may lie beyond it, those that documents hold may not.

    Raises `DataError` for every kind of bad input before any training. With several processes, call it on one rank,
    then after a barrier on the others: they find the finished cache.
    """
    settings = settings or TokenizeSettings()
    encoder = DocumentEncoder.of(tokenizer, settings)
    specs = parse_data_path(data_path)
    known = max(encoder.vocab_size, encoder.largest_id + 1)
    if vocab_size is not None and encoder.largest_id >= vocab_size:
        raise DataError(
            f"the tokenizer gives documents token ids up to {encoder.largest_id}, but the model's vocabulary (vocab_size in "
            f"its config.json) has only {vocab_size}: use the tokenizer that the model was trained with"
        )
    known = known if vocab_size is None else min(known, vocab_size)
    sources = tuple(_open_source(spec, encoder, settings, known) for spec in specs)
    return Corpus(sources, tuple(spec.weight or Fraction(1) for spec in specs), known)


def _open_source(
    spec: SourceSpec, encoder: DocumentEncoder, settings: TokenizeSettings, vocab_size: int
) -> DocumentSource:
    prefixes: list[Path] = []
    reports: list[TokenizeReport] = []
    for path in spec.paths:
        if is_text_source(path):
            prefix, report = cached_tokens(path, encoder, settings)
            reports.append(report)
        else:
            prefix = path
            TokenStore(prefix).check_vocabulary(vocab_size)
        prefixes.append(prefix)
    return DocumentSource(spec.name, prefixes, reports)
