"""From what the user names (`--data-path 0.7 a/*.jsonl 0.3 b.parquet`) to indexed documents of tokens.

parse_data_path -> one SourceSpec a source -> open_corpus tokenises what is text -> Corpus -> split by document
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_sip.data.ordering import Permutation
from megatron_sip.data.role_corpus import role_paths
from megatron_sip.data.roles import SPLITS, DocumentRole, Split, parse_shares
from megatron_sip.data.source_files import SourceSpec, parse_data_path
from megatron_sip.data.text_sources import is_text_source
from megatron_sip.data.token_store import TokenStore
from megatron_sip.data.tokenization import DocumentEncoder, TokenizeReport, TokenizeSettings, cached_tokens
from megatron_sip.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SPLIT = "969,30,1"
OWN_SPLITS = "--split {split}: with --subset the corpus has splits of its own: remove it"
_SPLIT_SEED = 20260121  # fixed: the held-out documents must not move when a run changes its seed
_OPEN_STORES = 128  # two file descriptors each


class DocumentSource:
    """The documents of several token stores, numbered through. Stores are opened when read, at most 128 at a time.

    With a `bos`, documents of stores that were made without it begin with it all the same: it counts among their tokens.
    """

    def __init__(
        self, name: str, prefixes: Sequence[Path], reports: Sequence[TokenizeReport], bos: int | None = None
    ) -> None:
        self.name = name
        self.bos = bos
        self.prefixes = tuple(prefixes)
        self.reports = tuple(reports)
        """One for each prefix that was made from text."""
        self._open = lru_cache(maxsize=_OPEN_STORES)(TokenStore)
        self._lacks_bos = [bos is not None and not self._open(prefix).begins_with(bos) for prefix in self.prefixes]
        lengths = [
            self._open(prefix).lengths + lacks_bos
            for prefix, lacks_bos in zip(self.prefixes, self._lacks_bos, strict=True)
        ]
        self.lengths: npt.NDArray[np.int64] = np.concatenate(lengths)
        """int64 [documents], tokens of each document."""
        self.counts = [len(part) for part in lengths]
        """Documents of each store."""
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, document: int) -> tuple[Path, int]:
        """(prefix of the store, document number in it)."""
        store, number = self._locate(document)
        return self.prefixes[store], number

    def _locate(self, document: int) -> tuple[int, int]:
        store = int(np.searchsorted(self._ends, document, side="right"))
        return store, document - (int(self._ends[store - 1]) if store else 0)

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> npt.NDArray[np.generic]:
        """The document's token ids from `start` to before `end`: a view of the mapped file, or where BOS is added a copy."""
        store, number = self._locate(document)
        ids = self._open(self.prefixes[store])[number]
        if not self._lacks_bos[store]:
            return ids[start:end]
        rest = ids[max(start - 1, 0) : None if end is None else max(end - 1, 0)]
        return np.concatenate([[self.bos], rest]) if start == 0 and end != 0 else rest


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
    return parse_shares(split, "--split", SPLITS)


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


def open_splits(
    names: Sequence[Split],
    data_path: Sequence[str],
    split: str | None,
    subset: DocumentRole | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: TokenizeSettings | None = None,
    vocab_size: int | None = None,
) -> dict[str, Corpus]:
    """The splits `names` of what --data-path names, each as `open_corpus` opens it: by weights (None: DEFAULT_SPLIT), or of
    corpora with roles (`subset` is one) their own. Raises `DataError`, also for weights of these."""
    if subset is None:
        return open_corpus(data_path, tokenizer, settings, vocab_size).split(split or DEFAULT_SPLIT)
    if split is not None:
        raise DataError(OWN_SPLITS.format(split=split))
    opened = {name: open_corpus(role_paths(data_path, subset, name), tokenizer, settings, vocab_size) for name in names}
    return {name: replace(corpus, split_name=name) for name, corpus in opened.items()}


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
    return DocumentSource(spec.name, prefixes, reports, encoder.bos)
