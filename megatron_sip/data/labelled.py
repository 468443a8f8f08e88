"""Labelled records as tasks: JSON lines of judgements, rewrites or thoughts, with the interface of `tasks.TaskSource`.

    records = open_records(("judgements/*.jsonl",), "969,30,1", writer)
    tasks = LabelledSource(records, "train", writer, seed=1234)
    tasks.task(7), tasks.tasks(step * batch, batch), tasks.report()

Task i of a run is a function of (seed, i). Memory holds where each record stands in its file, not the records. What a record
must hold, and how it becomes a prompt, is the business of the `WritesTasks` that is given.
"""

from __future__ import annotations

import hashlib
import mmap
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import orjson

from megatron_sip.data.documents import parse_split
from megatron_sip.data.ordering import Permutation, hash64
from megatron_sip.data.source_files import parse_data_path
from megatron_sip.data.text_sources import JSON_SUFFIXES, source_suffix
from megatron_sip.errors import DataError
from megatron_sip.records import Task

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
IntArray = npt.NDArray[np.int64]

_UNITS, _SINGLES = 1, 2  # separate the draws that share a seed
_OPEN_FILES = 128
_EXCERPT = 80


class WritesTasks(Protocol):
    """Makes tasks of one kind of records."""

    @property
    def identity(self) -> str:
        """Whatever the tasks depend on beside their records."""
        ...

    @property
    def counts(self) -> Counter[str]:
        """What happened to the tasks that were made, such as prompts that were cut."""
        ...

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether its prompt can be made short enough. Raises ValueError for a field that is missing or wrong."""
        ...

    def task(self, index: int, record: dict[str, Any]) -> Task:
        """The task of a record that fits."""
        ...


@dataclass(frozen=True)
class LabelledRecords:
    """Where the records of some files are, in the order of the files; each array has one entry a record.

    file: number of its path. begin, end: bytes of its line. partner: the record that shows the same texts in the other
    order, -1: none. split: number in SPLITS. too_long: records that do not fit, and are left out; digest: of the contents.
    """

    paths: tuple[Path, ...]
    file: IntArray
    begin: IntArray
    end: IntArray
    partner: IntArray
    split: IntArray
    too_long: int
    digest: str


def open_records(data_path: Sequence[str], split: str, writer: WritesTasks) -> LabelledRecords:
    """Read and check every record once. A record's own "split" wins over the shares of `split` ("969,30,1"), which go by a
    hash of its "pair", its "id" or, without either, its line: records that are added move no others.

    Raises:
        DataError: names the file, and the line of a record that cannot be used.
    """
    paths = _paths(data_path)
    edges = np.cumsum([float(share) for share in parse_split(split)])
    lines, digest = _Lines(), hashlib.sha256()
    for number, path in enumerate(paths):
        for line_number, begin, line in _lines(path):
            digest.update(line)
            where = f"{path}:{line_number}"
            record = _parse(line, where)
            try:
                fits = writer.fits(record)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from error
            lines.add(number, line_number, begin, len(line), _split_of(record, line, edges, where), fits)
            lines.pair.append(_hash(f"{number}\0{pair}".encode()) if (pair := record.get("pair")) is not None else 0)
    return lines.records(paths, digest.hexdigest())


class _Lines:
    """The columns of the index while files are read: 8 bytes an entry."""

    def __init__(self) -> None:
        self.file, self.line, self.begin, self.length, self.split, self.fits = (array("q") for _ in range(6))
        self.pair = array("Q")

    def add(self, *values: int) -> None:
        columns = (self.file, self.line, self.begin, self.length, self.split, self.fits)
        for column, value in zip(columns, values, strict=True):
            column.append(value)

    def records(self, paths: tuple[Path, ...], digest: str) -> LabelledRecords:
        file, line, begin, length, split, fits = (
            np.array(column, np.int64)
            for column in (self.file, self.line, self.begin, self.length, self.split, self.fits)
        )
        if not len(file):
            raise DataError(f"{paths[0]}: no record in it, nor in any other file of --data-path")
        pair = np.array(self.pair, np.uint64)
        partner = _partners(pair, split, lambda place: f"{paths[file[place]]}:{line[place]}")
        kept = (fits == 1) & ((partner < 0) | (fits[partner] == 1))  # of a pair both, or none
        number = np.cumsum(kept) - 1
        partner = np.where(partner < 0, -1, number[partner])
        return LabelledRecords(
            paths=paths,
            file=file[kept],
            begin=begin[kept],
            end=(begin + length)[kept],
            partner=partner[kept],
            split=split[kept],
            too_long=int((~kept).sum()),
            digest=digest,
        )


def _partners(pair: npt.NDArray[np.uint64], split: IntArray, where: Callable[[int], str]) -> IntArray:
    """int64: for each record the place of the other one of its pair (`pair` is its hash, 0: it is of none), or -1."""
    order = np.argsort(pair, kind="stable")
    same = (np.diff(pair[order]) == 0) & (pair[order][1:] != 0)
    if (third := np.flatnonzero(same[1:] & same[:-1])).size:
        raise DataError(
            f'{where(order[third[0] + 2])}: a third record of one "pair", which is two orders of the same texts'
        )
    first, second = order[:-1][same], order[1:][same]
    if (parted := np.flatnonzero(split[first] != split[second])).size:
        raise DataError(f'{where(second[parted[0]])}: another "split" than the other record of its "pair"')
    partner = np.full(len(pair), -1, np.int64)
    partner[first], partner[second] = second, first
    return partner


def _paths(data_path: Sequence[str]) -> tuple[Path, ...]:
    specs = parse_data_path(data_path)
    if specs[0].weight is not None:
        raise DataError("--data-path: files of labelled records have no weights; name a file twice as large instead")
    for path in specs[0].paths:
        if source_suffix(path) not in JSON_SUFFIXES:
            raise DataError(f"{path}: labelled records are read where they stand: uncompressed JSON lines (.jsonl)")
    return specs[0].paths


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, its first byte, the line) of each line that is not blank."""
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, begin, line
            begin += len(line)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        shown = line[:_EXCERPT].decode(errors="replace")
        raise DataError(f"{where}: not valid JSON ({error}): {shown!r}; each line must be one object") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a line must be a JSON object, this one is a {type(record).__name__}")
    return record


def _split_of(record: dict[str, Any], line: bytes, edges: npt.NDArray[np.float64], where: str) -> int:
    own = record.get("split")
    if own is not None:
        if own not in SPLITS:
            raise DataError(f'{where}: "split" is {own!r}; it is one of {", ".join(SPLITS)}')
        return SPLITS.index(own)
    name = next((str(record[field]) for field in ("pair", "id") if record.get(field) is not None), None)
    share = _hash(line if name is None else name.encode()) / 2**64
    return min(int(np.searchsorted(edges, share, side="right")), len(SPLITS) - 1)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


class LabelledSource:
    """Random access to the tasks of one split; see the module.

    An epoch has every record once, in an order of its own; the two records of a pair follow each other, at an even place,
    so that every even batch has both (where other records are odd in number, one of them comes twice an epoch).

    Raises `DataError` when the split has no record.
    """

    def __init__(self, records: LabelledRecords, split: Split, writer: WritesTasks, seed: int) -> None:
        self._records, self._split, self._writer, self._seed = records, split, writer, seed
        numbers = np.flatnonzero(records.split == SPLITS.index(split))
        partner = records.partner[numbers]
        self._numbers = numbers
        self._pairs = numbers[partner > numbers]
        """int64: the first record of each pair."""
        self._singles = numbers[partner < 0]
        if not len(numbers):
            raise DataError(
                f"--data-path: no record of the {split} split, of those that fit into --max-prompt-length ({records.too_long} "
                'do not); give it some by the field "split", or more with --split'
            )
        self._map = lru_cache(maxsize=_OPEN_FILES)(_mapped)

    def __len__(self) -> int:
        """Records of the split."""
        return len(self._numbers)

    @property
    def tasks_per_epoch(self) -> int:
        if not len(self._pairs):
            return len(self._singles)
        return 2 * (len(self._pairs) + -(-len(self._singles) // 2))

    def task(self, index: int) -> Task:
        """Task `index` (>= 0; past the first epoch too)."""
        return self._task(index, self._place(index))

    def tasks(self, start: int, count: int) -> list[Task]:
        """Tasks start, ..., start + count - 1."""
        return [self.task(index) for index in range(start, start + count)]

    def in_order(self, place: int) -> Task:
        """The task of the split's `place`-th record, as the files have them: for going through all of them once."""
        return self._task(place, int(self._numbers[place]))

    def document(self, index: int) -> tuple[int, int]:
        """(0, a number that only tasks of the same pair share): these are not independent."""
        place = self._place(index)
        partner = int(self._records.partner[place])
        return 0, place if partner < 0 else min(place, partner)

    def _place(self, index: int) -> int:
        """The record of task `index`."""
        if index < 0:
            raise IndexError(f"task index must not be negative, got {index}")
        epoch, position = divmod(index, self.tasks_per_epoch)
        singles = len(self._singles)
        if not len(self._pairs):
            return int(self._singles[self._shuffled(singles, _SINGLES, epoch, position)])
        unit = self._shuffled(self.tasks_per_epoch // 2, _UNITS, epoch, position // 2)
        second = position % 2
        if unit < len(self._pairs):
            first = int(self._pairs[unit])
            return int(self._records.partner[first]) if second else first
        place = (2 * (unit - len(self._pairs)) + second) % singles
        return int(self._singles[self._shuffled(singles, _SINGLES, epoch, place)])

    def _shuffled(self, size: int, what: int, epoch: int, position: int) -> int:
        return Permutation(size, hash64(self._seed, what, epoch))(position)

    def _task(self, index: int, place: int) -> Task:
        records = self._records
        path = records.paths[records.file[place]]
        begin, end = int(records.begin[place]), int(records.end[place])
        where = f"{path}, byte {begin}"
        record = _parse(self._map(path)[begin:end], where)
        try:
            return self._writer.task(index, record)
        except ValueError as error:
            raise DataError(f"{where}: {error}; the file was changed while the run had it open") from error

    def take_counts(self) -> dict[str, float]:
        """What happened to the tasks since the last call, by name, for a step's metrics."""
        counts = {f"tasks/{name}": float(count) for name, count in self._writer.counts.items()}
        self._writer.counts.clear()
        return counts

    def report(self, num_tasks: int | None = None) -> dict[str, Any]:
        """Counts of the split; with `num_tasks` also the "epochs" that so many tasks make. too_long: of all splits."""
        report: dict[str, Any] = {
            "split": self._split,
            "records": len(self),
            "pairs": len(self._pairs),
            "too_long": self._records.too_long,
            "tasks_per_epoch": self.tasks_per_epoch,
        }
        return report if num_tasks is None else report | {"epochs": num_tasks / self.tasks_per_epoch}

    def summary(self, num_tasks: int) -> str:
        """What a run of so many tasks has, in a line."""
        report = self.report(num_tasks)
        pairs = f", {report['pairs']:,} pairs among them" if report["pairs"] else ""
        long = f"; left out as too long {report['too_long']:,}" if report["too_long"] else ""
        return f"records {report['records']:,}{pairs}{long}; epochs in this run {report['epochs']:.2g}"

    def fingerprint(self) -> str:
        """A hash of all records and of what makes tasks of them: equal ones give equal tasks."""
        digest = hashlib.sha256(repr((self._split, self._seed, self._writer.identity, self._records.digest)).encode())
        for column in (self._numbers, self._records.begin, self._records.partner):
            digest.update(column.tobytes())
        return digest.hexdigest()


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
