"""Records into files: ours, verl's parquet, NeMo-Gym's JSON lines; balanced by a field first, if that is asked for.

    OUT/TASK.jsonl                  our own: every split, a field `split` in each record
    OUT/SPLIT.jsonl                 our own, of documents: the trainer divides a file of these by itself
    OUT/verl/SPLIT.parquet          rows with prompt, data_source, reward_model, ability, extra_info
    OUT/nemo-gym/SPLIT.jsonl        lines with responses_create_params, expected_answer, ...

A file gets its name when it is whole.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sip.data.ordering import uniform_below
from megatron_sip.data.roles import SPLITS
from megatron_sip.files import move_into_place
from megatron_sip.prepare.formats import VERL_SCHEMA, nemo_gym_line, verl_row
from megatron_sip.prepare.journal import Journal
from megatron_sip.prepare.settings import OutputSettings, PrepareError

Record = dict[str, Any]
Write = Callable[[Record], None]
ROWS_AT_ONCE = 512
DOCUMENTS = "documents"
"""Name of the records that are documents: what has no label, and the trainer knows no splits of."""


def write_records(journal: Journal, output: OutputSettings, task: str) -> dict[str, Any]:
    """Write every format's files from the journal's records; what was kept: total, by split, subset and label; what was not."""
    kept = Counter[tuple[str, ...]]()
    with ExitStack() as stack:
        writers = [w for name in output.formats for w in _writers(stack, output, name, task)]
        for record, is_kept in balanced(journal.records, output.balance, output.seed):
            if not is_kept:
                kept["left_out_to_balance", _label(record), record["split"]] += 1
                continue
            for split, write in writers:
                if split in (None, record["split"]):
                    write(record)
            kept["total",] += 1
            kept["by_split", record["split"]] += 1
            kept["by_subset", record["subset"], record["split"]] += 1
            if task != DOCUMENTS:
                kept["by_label", _label(record), record["split"]] += 1
    counts: dict[str, Any] = {"total": kept.pop(("total",), 0)}
    for (name, *path, last), count in sorted(kept.items()):
        place = counts.setdefault(name, {})
        for part in path:
            place = place.setdefault(part, {})
        place[last] = count
    return counts


def _label(record: Mapping[str, Any]) -> str:
    return str(record.get("verdict", record.get("safe")))


def balanced(records: Callable[[], Iterable[Record]], field: str | None, seed: int) -> Iterator[tuple[Record, bool]]:
    """The records, and whether each is kept: of each split as many with each value of `field` as there are of the rarest.

    Drawn one by one such that each record is as likely to be kept (Knuth's algorithm S): nothing but counts is held.
    """
    if field is None:
        yield from ((record, True) for record in records())
        return
    left = Counter((record["split"], record[field]) for record in records())
    values = sorted({value for _, value in left}, key=str)
    if len(values) == 1:
        raise PrepareError(
            f"all {left.total()} records have {field} = {values[0]}, so nothing is left when they are balanced: name other "
            f"files, or {'leave out --balance' if field == 'safe' else 'give --unbalanced'}"
        )
    wanted = {(split, value): min(left[split, v] for v in values) for split in SPLITS for value in values}
    for record in records():
        kind = record["split"], record[field]
        draw = uniform_below(left[kind], seed, zlib.crc32(repr(kind).encode()), left[kind])
        left[kind] -= 1
        is_kept = draw < wanted[kind]
        wanted[kind] -= is_kept
        yield record, is_kept


def _writers(stack: ExitStack, output: OutputSettings, name: str, task: str) -> list[tuple[str | None, Write]]:
    """(split that it takes, None: all, the writer) of each file of a format."""
    folder = output.folder
    if name == "sip" and task == DOCUMENTS:
        return [(split, stack.enter_context(_lines(folder / f"{split}.jsonl", dict))) for split in SPLITS]
    if name == "sip":
        return [(None, stack.enter_context(_lines(folder / f"{task}.jsonl", dict)))]
    if name == "verl":
        return [
            (split, stack.enter_context(_parquet(folder / "verl" / f"{split}.parquet", output))) for split in SPLITS
        ]
    return [
        (
            split,
            stack.enter_context(
                _lines(
                    folder / "nemo-gym" / f"{split}.jsonl",
                    lambda record: nemo_gym_line(record, output.seed, output.rewrite_prompt),
                )
            ),
        )
        for split in SPLITS
    ]


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial")
    yield staged
    move_into_place(staged, path)


@contextmanager
def _lines(path: Path, convert: Callable[[Record], Record]) -> Iterator[Write]:
    with _staged(path) as staged, staged.open("wb") as file:

        def write(record: Record) -> None:
            file.write(orjson.dumps(convert(record)) + b"\n")

        yield write


@contextmanager
def _parquet(path: Path, output: OutputSettings) -> Iterator[Write]:
    rows: list[Record] = []
    with _staged(path) as staged, pq.ParquetWriter(staged, VERL_SCHEMA) as file:

        def flush() -> None:
            file.write_table(pa.Table.from_pylist(rows, schema=VERL_SCHEMA))
            rows.clear()

        def write(record: Record) -> None:
            rows.append(verl_row(record, next(index), output.seed, output.rewrite_prompt))
            if len(rows) >= ROWS_AT_ONCE:
                flush()

        index = itertools.count()
        yield write
        flush()
