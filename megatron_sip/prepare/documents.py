"""The documents of one role, read in file order from any place on, with flat memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sip.data.roles import Split, text_key
from megatron_sip.data.text_sources import read_records, stem_of
from megatron_sip.judge.prompts import valid_unicode
from megatron_sip.prepare.settings import PrepareError, ReadSettings

Place = tuple[int, int]
"""(files read to their end, documents read of the next one)."""
MISSING = object()


@dataclass(frozen=True, slots=True)
class Document:
    """A document as it was read. key: `text_key` of its text. place: of its record. subset: what it is counted under.

    prefix: what stands before its text, where the records say. safe: what its label says, None without one.
    """

    text: str
    key: int
    place: Place
    split: Split
    subset: str
    prefix: str = ""
    safe: bool | None = None


class DocumentReader:
    """Iterates over the documents of a role behind `position`, which moves on with them, as do `counts` and the bar.

    Role and split go by the text; of a record that is cut already by what stands before it, whose continuations stay together.
    """

    def __init__(self, settings: ReadSettings, position: Place, counts: Counter[str], bar: tqdm[Any]) -> None:
        self.position = position
        self.counts = counts
        self._settings = settings
        self._bar = bar

    def __iter__(self) -> Iterator[Document]:
        settings = self._settings
        first, skipped = self.position
        for number, path in enumerate(settings.paths[first:], start=first):
            read_before, row = self._bar.n, 0
            for batch in read_records(path, settings.text_field, _top_fields(settings)):
                for record in batch.records:
                    if self.counts["documents/used"] == settings.max_documents:
                        return
                    row += 1
                    if number == first and row <= skipped:
                        continue
                    self.position = number, row
                    if (document := self._document(record, path)) is not None:
                        self.counts["documents/used"] += 1
                        self.counts[f"documents/by_split/{document.split}"] += 1
                        yield document
                self._bar.update(read_before + batch.position - self._bar.n)
            self.position = number + 1, 0

    def _document(self, record: Mapping[str, Any], path: Path) -> Document | None:
        settings = self._settings
        where = f"{path}: record {self.position[1]}"
        text = record[settings.text_field]
        self.counts["documents/read"] += 1
        if not text.strip():
            self.counts["dropped/empty"] += 1
            return None
        prefix = "" if settings.prefix_field is None else text_field_of(record, settings.prefix_field, where)
        whose = text_key(prefix if prefix.strip() else text)
        role = settings.shares.role(whose)
        self.counts[f"documents/by_role/{role}"] += 1
        split = settings.shares.split(whose)
        if role != settings.role or settings.split not in (None, split):
            return None
        safe = None
        if settings.label_field is not None:
            label = field_of(record, settings.label_field)
            if label is None:
                self.counts["dropped/no-label"] += 1
                return None
            safe = is_safe(label, settings, where)
        subset = stem_of(path)
        if settings.subset_field is not None:
            subset = valid_unicode(str(field_of(record, settings.subset_field, where)))
        return Document(text, text_key(text), self.position, split, subset, prefix, safe)


def _top_fields(settings: ReadSettings) -> list[str]:
    named = (settings.prefix_field, settings.subset_field, settings.label_field)
    return [name.split(".")[0] for name in named if name is not None]


def field_of(record: Mapping[str, Any], name: str, where: str = "") -> Any:
    """The value under `name`, whose dots lead into objects. Raises PrepareError where there is none and `where` is given."""
    value: Any = record
    for part in name.split("."):
        value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
    if value is MISSING and where:
        raise PrepareError(f"{where}: no field {name!r}; it has {', '.join(sorted(record))}")
    return None if value is MISSING else value


def text_field_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """As `field_of`, for a field that must hold text."""
    value = field_of(record, name, where)
    if not isinstance(value, str):
        raise PrepareError(f"{where}: field {name!r} must be a string, it is {type(value).__name__}")
    return valid_unicode(value)


def is_safe(label: Any, settings: ReadSettings, where: str) -> bool:
    """What a label says: a truth value, or one of the words that the settings give. Raises PrepareError for any other."""
    word = str(label).lower() if isinstance(label, bool) else str(label)  # as JSON spells it
    if word in settings.safe_labels or word in settings.unsafe_labels:
        return word in settings.safe_labels
    if isinstance(label, bool) and not settings.safe_labels and not settings.unsafe_labels:
        return label
    raise PrepareError(
        f"{where}: the label {label!r} in field {settings.label_field!r} is neither safe nor unsafe: name it with "
        "--safe-labels or --unsafe-labels (without these, true is safe and false is not)"
    )
