"""Cut documents into prefix-conditioned suffix generation tasks (paper sections 2.1 and 3.1, appendix B.1).

Task i of a run is a function of (seed, i): random access, no iterator state. A checkpoint stores one integer, and any
rank can recompute any step's tasks. Documents too short to cut are counted in `report()`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_sip.data.continuation_text import LOOKAHEAD, continuation_texts
from megatron_sip.data.documents import Corpus, DocumentSource
from megatron_sip.data.ordering import Permutation, hash64, make_blend, uniform_below
from megatron_sip.data.token_store import bin_path, check_token_ids
from megatron_sip.errors import DataError
from megatron_sip.records import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TaskMode = Literal["random", "stream", "whole"]
_SHUFFLE, _CUT = 1, 2  # separate the draws that share a seed


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """How documents are cut.

    random: one task a document and epoch, its cut uniform among the valid ones, another one each epoch.
    stream: every chunk of `suffix_length` tokens but a document's first, in turn; documents are shuffled each epoch.
    whole: no suffixes, but a document in pieces of up to `seq_length` tokens, each behind one token of the piece before, so
    that all its tokens but the first are predicted once an epoch (see `whole`); for next-token loss on all of them.
    The suffix has exactly `suffix_length` tokens, the prefix the most recent seq_length - suffix_length tokens before
    it or fewer, but at least `min_prefix_length`. Raises DataError for impossible lengths.
    """

    seq_length: int
    suffix_length: int = 128
    mode: TaskMode = "random"
    seed: int = 1234
    min_prefix_length: int = 1

    def __post_init__(self) -> None:
        if self.suffix_length < 1:
            raise DataError(f"--suffix-length must be at least 1, got {self.suffix_length}")
        if self.min_prefix_length < 1:
            raise DataError(f"--min-prefix-length must be at least 1, got {self.min_prefix_length}")
        if self.suffix_length + self.min_prefix_length > self.seq_length:
            raise DataError(
                f"--suffix-length {self.suffix_length} leaves {self.seq_length - self.suffix_length} tokens of "
                f"--seq-length {self.seq_length} for the prefix, which needs at "
                f"least {self.min_prefix_length}; shorten the suffix"
            )
        if self.mode not in ("random", "stream", "whole"):
            raise DataError(f"--task-mode must be random, stream or whole, got {self.mode!r}")

    @classmethod
    def whole(cls, seq_length: int, seed: int) -> TaskSettings:
        """Of mode whole: a prefix of one token, and the rest of the piece as its suffix. Raises DataError."""
        if seq_length < 2:
            raise DataError(f"--seq-length {seq_length}: must be at least 2")
        return cls(seq_length, seq_length - 1, "whole", seed)

    def first_cut(self, bos: bool) -> int:
        """The first place where a document may be cut: behind the shortest prefix, to which a BOS does not count.

        stream: the beginning of the first chunk that has a long enough prefix.
        """
        if self.mode == "whole":
            return 1
        first = self.min_prefix_length + bos
        return -(-first // self.suffix_length) * self.suffix_length if self.mode == "stream" else first

    def tasks_per_document(self, source: DocumentSource, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64: tasks an epoch that these documents of a source give."""
        if self.mode == "whole":
            return -(-np.maximum(source.lengths[documents] - 1, 0) // self.suffix_length)
        chunks = np.maximum(source.lengths[documents] - self.first_cut(source.bos is not None), 0) // self.suffix_length
        return chunks if self.mode == "stream" else np.minimum(chunks, 1)

    def window(self, cut: int) -> tuple[int, int]:
        """(first token of the prefix, first token behind the suffix) of a document that is cut at token `cut`."""
        return max(0, cut - (self.seq_length - self.suffix_length)), cut + self.suffix_length

    def shortest(self, source: DocumentSource) -> int:
        """Tokens of the shortest document that gives a task."""
        return self.first_cut(source.bos is not None) + (1 if self.mode == "whole" else self.suffix_length)


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What a split of one source holds; `empty_documents` is of the whole source, found when it was tokenised."""

    name: str
    weight: float
    documents: int
    tokens: int
    too_short: int
    too_short_tokens: int
    empty_documents: int
    tasks_per_epoch: int


class _CutSource:
    """The tasks of one source, numbered through all epochs: which document, and where it is cut."""

    def __init__(self, source: DocumentSource, number: int, documents: npt.NDArray[np.int64], settings: TaskSettings):
        tasks = settings.tasks_per_document(source, documents)
        self.source = source
        self.documents = documents[tasks > 0]
        self.tasks_per_epoch = int(tasks.sum())
        self._tasks = tasks[tasks > 0]
        self._number = number
        self._settings = settings
        self._first_cut = settings.first_cut(source.bos is not None)
        # Stream mode needs the running total of tasks in shuffled order. Two epochs are kept: a step may straddle them.
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    def cut(self, sample: int) -> tuple[int, int]:
        """(document number, first token of the suffix) of the source's `sample`-th task, counted over epochs."""
        settings = self._settings
        epoch, position = divmod(sample, self.tasks_per_epoch)
        if settings.mode == "random":
            document = int(self.documents[self._shuffle(epoch)(position)])
            choices = int(self.source.lengths[document]) - self._first_cut - settings.suffix_length + 1
            draw = uniform_below(choices, settings.seed, _CUT, self._number, epoch, document)
            return document, self._first_cut + draw
        order, ends = self._epoch_order(epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        chunk = position - (int(ends[place - 1]) if place else 0)
        return int(self.documents[order[place]]), self._first_cut + chunk * settings.suffix_length

    def _shuffle(self, epoch: int) -> Permutation:
        return Permutation(len(self.documents), hash64(self._settings.seed, _SHUFFLE, self._number, epoch))

    def _make_epoch_order(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        order = self._shuffle(epoch).take(np.arange(len(self.documents), dtype=np.int64))
        return order, np.cumsum(self._tasks[order])


class Tasks(Protocol):
    """Where a run's tasks come from: documents that are cut, or labelled records."""

    def task(self, index: int) -> Task:
        """Task `index`, a function of the run's seed and `index` alone."""
        ...

    def tasks(self, start: int, count: int) -> list[Task]:
        """Tasks start, ..., start + count - 1."""
        ...

    def document(self, index: int) -> tuple[int, int]:
        """Equal for tasks that are not independent."""
        ...

    def report(self, num_tasks: int | None = None) -> dict[str, Any]:
        """Counts, of `num_tasks` tasks too."""
        ...

    def summary(self, num_tasks: int) -> str:
        """What a run of so many tasks has, in a line; its log holds the rest of `report`."""
        ...

    def take_counts(self) -> dict[str, float]:
        """What happened to the tasks that were made since the last call, by name, for a step's metrics."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal tasks. A checkpoint keeps it, so that a cursor is not resumed on other data."""
        ...


class TaskSource:
    """Random access to the tasks of a corpus (or of a split of it).

        tasks = TaskSource(corpus.split("969,30,1")["train"], tokenizer, TaskSettings(seq_length=2048))
        tasks.task(7), tasks.tasks(step * batch, batch), tasks.report()

    Raises `DataError` when a source has no document long enough.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> None:
        self.settings = settings
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._blend = make_blend(corpus.weights)
        self._sources: list[_CutSource] = []
        self._reports: list[SourceReport] = []
        for number, source in enumerate(corpus.sources):
            documents = corpus.documents(number)
            cuts = _CutSource(source, number, documents, settings)
            report = _source_report(source, float(self._blend.weights[number]), documents, cuts, settings)
            if not cuts.tasks_per_epoch:
                raise DataError(_nothing_long_enough(report, corpus, source, documents, settings))
            self._sources.append(cuts)
            self._reports.append(report)

    @property
    def tasks_per_epoch(self) -> list[int]:
        """Tasks an epoch of each source."""
        return [source.tasks_per_epoch for source in self._sources]

    def task(self, index: int) -> Task:
        """Task `index` (>= 0; past the first epoch too). Raises `DataError` for token ids beyond the vocabulary."""
        if index < 0:
            raise IndexError(f"task index must not be negative, got {index}")
        number, sample = self._blend.locate(index)
        document, cut = self._sources[number].cut(sample)
        source, settings = self._corpus.sources[number], self.settings
        start, end = settings.window(cut)
        window = source.tokens(document, start, end + LOOKAHEAD)
        check_token_ids(window, self._corpus.vocab_size, bin_path(source.locate(document)[0]))
        ids = window.tolist()
        prefix, suffix, after = ids[: cut - start], ids[cut - start : end - start], ids[end - start :]
        if source.bos is not None and start == 0 and prefix[:2] == [source.bos, source.bos]:
            del prefix[0]  # some documents of a store without it may have their own
        texts = continuation_texts(self._tokenizer, prefix, suffix, after, cut_before=start > 0)
        return Task(index, prefix, suffix, *texts)

    def document(self, index: int) -> tuple[int, int]:
        """(source number, document number) that task `index` is cut from: tasks of one document are not independent."""
        number, sample = self._blend.locate(index)
        return number, self._sources[number].cut(sample)[0]

    def tasks(self, start: int, count: int) -> list[Task]:
        """Tasks start, ..., start + count - 1."""
        return [self.task(index) for index in range(start, start + count)]

    def report(self, num_tasks: int | None = None) -> dict[str, Any]:
        """Counts over all sources and, under "sources", of each (see `SourceReport`).

        With `num_tasks` also the "epochs" that so many tasks make of each source, fractions included.
        """
        sources = [{name: getattr(r, name) for name in SourceReport.__dataclass_fields__} for r in self._reports]
        if num_tasks is not None:
            for source, count in zip(sources, self._blend.count_before(num_tasks), strict=True):
                source["epochs"] = count / source["tasks_per_epoch"]
        totals = ("documents", "tokens", "too_short", "too_short_tokens", "empty_documents", "tasks_per_epoch")
        report: dict[str, Any] = {name: sum(source[name] for source in sources) for name in totals}
        return report | {"split": self._corpus.split_name, "sources": sources}

    def summary(self, num_tasks: int) -> str:
        """What the tasks are cut from, in a line."""
        report = self.report(num_tasks)
        passes = max(source["epochs"] for source in report["sources"])
        count = len(report["sources"])
        short = f", {report['too_short']:,} of them too short" if report["too_short"] else ""
        return (
            f"documents {report['documents']:,}{short}, tokens {report['tokens']:,}, sources {count}; epochs in this run "
            f"{passes:.2g}{' at most' * (count > 1)}"
        )

    def take_counts(self) -> dict[str, float]:
        """Nothing is cut short or left out on the way: what is too short was counted at the start."""
        return {}

    def fingerprint(self) -> str:
        """A hash of the documents' lengths and of all settings: equal ones give equal tasks, unless text was edited in
        place to the same lengths. A checkpoint keeps it, so that a cursor is not resumed on other data."""
        digest = hashlib.sha256(repr((self.settings, self._blend.weights)).encode())
        for cuts in self._sources:
            if cuts.source.bos is not None:
                digest.update(f"bos {cuts.source.bos}".encode())
            digest.update(cuts.documents.tobytes())
            digest.update(cuts.source.lengths[cuts.documents].tobytes())
        return digest.hexdigest()


def _source_report(
    source: DocumentSource, weight: float, documents: npt.NDArray[np.int64], cuts: _CutSource, settings: TaskSettings
) -> SourceReport:
    lengths = source.lengths[documents]
    short = lengths[lengths < settings.shortest(source)]
    return SourceReport(
        name=source.name,
        weight=weight,
        documents=len(documents),
        tokens=int(lengths.sum()),
        too_short=len(short),
        too_short_tokens=int(short.sum()),
        empty_documents=sum(report.empty_documents for report in source.reports),
        tasks_per_epoch=cuts.tasks_per_epoch,
    )


def _nothing_long_enough(
    report: SourceReport,
    corpus: Corpus,
    source: DocumentSource,
    documents: npt.NDArray[np.int64],
    settings: TaskSettings,
) -> str:
    where = f"{report.name} ({corpus.split_name} split)"
    if not report.documents:
        return f"{where}: no document; name more text or give this split more with --split"
    longest = int(source.lengths[documents].max())
    if settings.mode == "whole":
        return f"{where}: none of its {report.documents} documents has two tokens; name more text"
    return (
        f"{where}: none of its {report.documents} documents is long enough: the longest has "
        f"{longest} tokens, a {settings.mode} task needs "
        f"{settings.shortest(source)} (--suffix-length "
        f"{settings.suffix_length} after a prefix of at least {settings.min_prefix_length}; --seq-length "
        f"{settings.seq_length}); shorten --suffix-length or use longer text"
    )
