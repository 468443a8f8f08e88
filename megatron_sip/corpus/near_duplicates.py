"""Which of many documents repeat an earlier one that is kept.

As a walk through them in order that keeps a document unless it is like one that it has kept: the first stays. Only those that
share a key with another are walked over; the others are told apart by sorting the keys, with some 30 bytes a document.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_sip.console import bars
from megatron_sip.corpus.ngrams import Hashes

Documents = npt.NDArray[np.int64]
Alike = Callable[[int, Documents], npt.NDArray[np.bool_]]
"""(document, others) -> of each of the others whether it is so like the document that one of them goes."""


def originals(columns: Iterable[Hashes], candidates: npt.NDArray[np.bool_], alike: Alike) -> Documents:
    """int64 [documents]: the first kept document that each repeats, -1 where it is kept itself.

    columns: uint64 [documents] each; those that are equal in one of them are compared. candidates: bool [documents], the others
    are kept and compared with none.
    """
    found = np.full(len(candidates), -1, np.int64)
    members, groups = _groups(columns, np.flatnonzero(candidates))
    kept: dict[int, list[int]] = defaultdict(list)
    begins = np.flatnonzero(np.diff(members, prepend=-1))
    spans = zip(begins, [*begins[1:], len(members)], strict=False)
    for begin, end in tqdm(spans, "compare", len(begins), file=bars(), unit="documents"):
        document, own = int(members[begin]), groups[begin:end].tolist()
        others = np.array(sorted({other for group in own for other in kept[group]}), np.int64)
        same = others[alike(document, others)] if len(others) else others
        if len(same):
            found[document] = same[0]
        else:
            for group in own:
                kept[group].append(document)
    return found


def _groups(columns: Iterable[Hashes], documents: Documents) -> tuple[Documents, Documents]:
    """(documents, number of a group that each is in), by document: groups have an equal value in a column, and two members."""
    members, groups, count = [documents[:0]], [documents[:0]], 0
    for column in columns:
        values = column[documents]
        order = np.argsort(values, kind="stable")
        numbers = np.cumsum(np.append(False, np.diff(values[order]) != 0))[: len(order)]
        shared = np.bincount(numbers)[numbers] > 1
        members.append(documents[order[shared]])
        groups.append(count + numbers[shared])
        count += len(documents)
    all_members, all_groups = np.concatenate(members), np.concatenate(groups)
    by_document = np.argsort(all_members, kind="stable")
    return all_members[by_document], all_groups[by_document]
